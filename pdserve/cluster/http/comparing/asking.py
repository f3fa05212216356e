"""The bodies of ``score`` and ``rerank``, and the texts that they compare.

``score`` is vLLM's; ``rerank`` is Cohere's and Jina's as vLLM has it. What of theirs changes which
text is compared, and we do not have, is refused by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from pdserve.cluster.gateway.parameters import shown
from pdserve.cluster.http.schemas import Body, Texts
from pdserve.errors import ConflictingFields, InvalidField

TEXTS_MAX = 2048
"""In one request, queries and documents together; as many as ``/v1/embeddings`` takes."""

TOP_N_MAX = 1 << 20
"""More than there can be documents. Cohere's clients ask for more than they send."""


@dataclass(frozen=True, slots=True)
class Text:
    field: str  # what to name when something is wrong with it
    text: str
    tokens_max: int | None = None  # the first so many count; None: all


class _Comparison(Body):
    user: str | None = None
    service_tier: str | None = None
    priority: int | None = Field(None, description="Ignored; see service_tier.")
    truncate_prompt_tokens: int | None = Field(
        None, description="Take the last so many tokens of each text; -1: what fits."
    )
    add_special_tokens: bool | None = None
    use_activation: bool | None = Field(None, description="Ignored: a cosine has no activation.")


class ScoreBody(_Comparison):
    """One of two pairs of names for the same two sides; one text on the left is compared with each
    on the right."""

    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    queries: str | Texts | None = None
    documents: str | Texts | None = None

    def sides(self) -> tuple[list[Text], list[Text]]:
        """
        Raises:
            ConflictingFields: not just one pair was sent, or the sides do not fit together.
            InvalidField: a side is empty, or there are too many texts.
        """
        pairs = (("text_1", "text_2"), ("queries", "documents"))
        sent = [pair for pair in pairs if any(getattr(self, name) is not None for name in pair)]
        if len(sent) != 1:
            raise ConflictingFields(
                "text_1", "and text_2 are one way, queries and documents another; send one of them"
            )
        names = sent[0]
        for name in names:
            if getattr(self, name) is None:
                raise ConflictingFields(name, "is missing beside the other side of the comparison")
        left, right = (_texts(name, getattr(self, name)) for name in names)
        if len(left) not in (1, len(right)):
            raise ConflictingFields(
                names[0],
                f"holds {len(left)} texts and {names[1]} {len(right)}; send one text, or as many",
            )
        _check_count(names[1], len(left) + len(right))
        return left, right


class RerankBody(_Comparison):
    query: str
    documents: Annotated[list[str | dict[str, Any]], Field(fail_fast=True)]
    top_n: int | None = Field(None, description="How many of the best; 0: all.")
    return_documents: bool | None = Field(None, description="With their texts; true.")
    max_tokens_per_doc: int | None = Field(None, description="The first so many of each count.")
    max_tokens_per_query: int | None = Field(None, description="The first so many of it count.")
    # What would compare other texts than these, which we do not do.
    rank_fields: Any = None
    instruction: Any = None
    max_chunks_per_doc: Any = None
    truncation_side: Any = None

    def sides(self) -> tuple[list[Text], list[Text]]:
        """The query, and the documents.

        Raises:
            InvalidField: one of them is nothing to compare.
        """
        self._check_unsupported()
        self.top()
        query = Text("query", self.query, _tokens_max("max_tokens_per_query", self))
        tokens_max = _tokens_max("max_tokens_per_doc", self)
        if not self.documents:
            raise InvalidField("documents", "is empty, must hold at least one document")
        _check_count("documents", 1 + len(self.documents))
        documents = [
            Text(f"documents.{index}", _document(index, each), tokens_max)
            for index, each in enumerate(self.documents)
        ]
        return [query], documents

    def top(self) -> int | None:
        """How many of the best are wanted; None: all."""
        if self.top_n is not None and not 0 <= self.top_n <= TOP_N_MAX:
            raise InvalidField("top_n", f"is {shown(self.top_n)}, must be from 0 to {TOP_N_MAX}")
        return self.top_n or None

    def _check_unsupported(self) -> None:
        for name in ("rank_fields", "instruction", "max_chunks_per_doc", "truncation_side"):
            value = getattr(self, name)
            if value is not None:
                raise InvalidField(
                    name, f"is {shown(value)}, which this server does not support; leave it out"
                )


def _texts(name: str, given: str | Sequence[str]) -> list[Text]:
    if isinstance(given, str):
        return [Text(name, given)]
    if not given:
        raise InvalidField(name, "is empty, must hold at least one text")
    return [Text(f"{name}.{index}", text) for index, text in enumerate(given)]


def _document(index: int, document: Any) -> str:
    """Cohere's are texts, or objects with a text."""
    text = document if isinstance(document, str) else document.get("text")
    if not isinstance(text, str):
        raise InvalidField(f"documents.{index}.text", f"is {shown(text)}, must be text")
    return text


def _tokens_max(name: str, body: RerankBody) -> int | None:
    count: int | None = getattr(body, name)
    if count is not None and not 1 <= count <= TOP_N_MAX:
        raise InvalidField(name, f"is {shown(count)}, must be from 1 to {TOP_N_MAX}")
    return count


def _check_count(name: str, count: int) -> None:
    if count > TEXTS_MAX:
        raise InvalidField(name, f"makes {count} texts to compare, at most {TEXTS_MAX} pass")
