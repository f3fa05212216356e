"""vLLM's flags of ``vllm serve``, said in ours. Pure: words in, words out.

A command line from the field should work as it is. ``FLAGS`` is the whole of what is known, and
every flag in it has one of three effects:

    it sets something       the words of ours that set the same
    it changes nothing      accepted, and a line for the console that says why
    it cannot be honoured   ``ConfigError``, which names the flag and the way out

What would change answers, or promises what is not there, is never dropped silently. A flag that is
neither ours nor here is refused by ``ServeCommand``, which puts this table before the command's own
parser. ``docs/from_vllm.md`` shows the table to people.

Spelling as vLLM's parser takes it: ``--flag value``, ``--flag=value``, ``_`` for ``-``.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

from typer.core import TyperCommand

from pdserve.config import PoolConfig, Quantization, ReasoningStyle, StoredAs, ToolCallStyle
from pdserve.errors import ConfigError
from pdserve.settings import nearest

NOTES = "pdserve.vllm_notes"
"""Where a command finds, in its context's ``meta``, what is to be said on the console."""

UNITS: Mapping[str, int] = MappingProxyType(
    {"k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
)
"""As vLLM reads them: small letters are decimal, capitals binary."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What a flag comes to: ``words`` of ours, and where its effect is not all that its name says,
    a ``note``."""

    words: tuple[str, ...] = ()
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Flag:
    name: str
    effect: Callable[[str], Effect]  # of the value, "" where there is none; may raise ConfigError
    takes: int | None = 1  # values: 0, 1, or None for all up to the next flag


@dataclass(frozen=True, slots=True)
class Translation:
    words: tuple[str, ...]
    notes: tuple[str, ...]


def translate(words: Sequence[str]) -> Translation:
    """The command line in our words, and what is to be said of it; ours pass as they are.

    Raises:
        ConfigError: a flag has no value, a wrong one, or one that cannot be honoured.
    """
    ours: list[str] = []
    notes: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        flag = FLAGS.get(ALIASES.get(name, name.replace("_", "-")))
        if word == "--":
            return Translation((*ours, word, *rest), tuple(notes))
        if flag is None or not name.startswith("-"):
            ours.append(word)
            continue
        if equals and flag.takes == 0:
            raise ConfigError(f"{flag.name} takes no value; leave out {'=' + value!r}")
        values = [value] if equals else _take(flag, rest)
        try:
            effect = flag.effect(" ".join(values))
        except ValueError as error:
            raise ConfigError(f"{flag.name} is {' '.join(values)!r}, must be {error}") from None
        except ConfigError as error:
            raise ConfigError(f"{flag.name} {error}") from None
        ours += effect.words
        if effect.note:
            notes.append(f"{flag.name}: {effect.note}")
    return Translation(tuple(ours), tuple(notes))


def _take(flag: Flag, rest: list[str]) -> list[str]:
    """The values that follow ``flag``, taken off ``rest``."""
    count = len(rest) if flag.takes is None else flag.takes
    values: list[str] = []
    # A negative number is a value; anything else with a dash is the next flag.
    while rest and len(values) < count and not re.match(r"-[^\d]", rest[0]):
        values.append(rest.pop(0))
    if not values and flag.takes != 0:
        raise ConfigError(f"{flag.name} needs a value; say {flag.name} VALUE")
    return values


# ── effects ──────────────────────────────────────────────────────────────────────────────────────


def _set(**values: object) -> tuple[str, ...]:
    """Settings as words; ``part__field`` is part.field."""
    return tuple(
        word
        for name, value in values.items()
        for word in ("--set", f"{name.replace('__', '.')}={json.dumps(value)}")
    )


def _whole(text: str) -> int:
    """A positive whole number, also as vLLM takes it: 4096, 32k, 1.5k, 32K."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", text)
    if number is None or ("." in text and number[2] not in ("k", "m", "g")):
        raise ValueError("a positive whole number such as 4096, 4k or 4K")
    value = round(float(number[1]) * UNITS[number[2]]) if number[2] else int(number[1])
    if value < 1:
        raise ValueError("at least 1")
    return value


def _sets(*names: str) -> Callable[[str], Effect]:
    """Sets every one of ``names`` (part__field) to the number."""
    return lambda text: Effect(_set(**dict.fromkeys(names, _whole(text))))


def _text(name: str) -> Callable[[str], Effect]:
    return lambda text: Effect(_set(**{name: text}))


def _idle(why: str) -> Callable[[str], Effect]:
    return lambda _: Effect(note=f"no effect here; {why}")


def _only(*values: str, way_out: str) -> Callable[[str], Effect]:
    """Changes nothing with one of ``values``; any other cannot be honoured."""

    def effect(text: str) -> Effect:
        if text not in values:
            raise ConfigError(f"is {text}, can only be {' or '.join(values)} here; {way_out}")
        return Effect()

    return effect


def _refuse(way_out: str) -> Callable[[str], Effect]:
    def effect(_: str) -> Effect:
        raise ConfigError(f"is not supported; {way_out}")  # no value: it may be a secret

    return effect


def _one_of(name: str, meanings: Mapping[str, object], way_out: str) -> Callable[[str], Effect]:
    """Sets ``name`` to what ``meanings`` says of the word; the others cannot be honoured."""

    def effect(text: str) -> Effect:
        if text not in meanings:
            raise ConfigError(f"is {text}, can be {', '.join(meanings)}; {way_out}")
        return Effect(_set(**{name: meanings[text]}))

    return effect


def _context(text: str) -> Effect:
    # vLLM fits the context to its memory; ours keeps the model's own, and refuses what is too long.
    return Effect() if text in ("auto", "-1") else _sets("model__context_tokens")(text)


def _batched_tokens(text: str) -> Effect:
    tokens = _whole(text)
    mixed_tokens = min(tokens, PoolConfig().mixed_chunk_tokens)  # is within the chunk, as there
    return Effect(
        _set(
            prefill__chunk_tokens=tokens,
            decode__chunk_tokens=tokens,
            decode__mixed_chunk_tokens=mixed_tokens,
        )
    )


def _served_name(text: str) -> Effect:
    if " " in text:
        raise ConfigError(f"is {text}, but a model has one name here; MODEL goes before this flag")
    return Effect(_set(model__served_name=text))


def _logprobs(text: str) -> Effect:
    from pdserve.cluster.gateway.parameters import LOGPROBS_MAX

    if not (text.isdigit() and int(text) <= LOGPROBS_MAX):
        raise ConfigError(f"is {text}, can be at most {LOGPROBS_MAX}; lower it, or leave it out")
    return Effect(note=f"no effect here; up to {LOGPROBS_MAX} are always allowed")


def _pooling(text: str) -> Effect:
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    kind = said.get("pooling_type") if isinstance(said, dict) and len(said) == 1 else None
    if not isinstance(kind, str) or kind.upper() not in ("LAST", "MEAN"):
        raise ConfigError('is another than {"pooling_type": "LAST"} or {"pooling_type": "MEAN"}')
    return Effect(_set(gateway__pooling=kind.lower()))


def _speculation(text: str) -> Effect:
    try:
        config = json.loads(text)
        tokens = int(config.get("num_speculative_tokens", PoolConfig().draft_tokens_max))
    except (ValueError, TypeError, AttributeError):
        raise ValueError('JSON such as {"method": "ngram", "num_speculative_tokens": 4}') from None
    model = config.get("model")
    match config.get("method", "draft_model" if model else None):
        case "ngram":
            how = _set(decode__speculation="prompt_lookup")
        case "draft_model" if isinstance(model, str) and model:
            how = _set(decode__speculation="draft_model", decode__draft_model=model)
        case "draft_model":
            raise ConfigError('has method draft_model and no "model", which is the draft model')
        case method:
            raise ConfigError(
                f"has method {method}, can only be ngram or draft_model; leave it out, answers are "
                "the same without"
            )
    return Effect(how + _set(decode__draft_tokens_max=tokens))


def _adapters(text: str) -> Effect:
    """``name=path`` or JSON, any number of either, a space between them."""
    wrong = ValueError('name=path, or {"name": "…", "path": "…"}, once for each adapter')
    adapters: dict[str, str] = {}
    rest = text.strip()
    while rest:
        if rest.startswith("{"):
            try:
                module, end = json.JSONDecoder().raw_decode(rest)
                name, path = module["name"], module["path"]
            except (ValueError, KeyError):
                raise wrong from None
            rest = rest[end:].strip()
        else:
            word, _, rest = rest.partition(" ")
            name, _, path = word.partition("=")
        if not (isinstance(name, str) and isinstance(path, str) and name and path):
            raise wrong
        adapters[name] = path
    return Effect(_set(model__adapters=adapters))


def _quantization(text: str) -> Effect:
    """Ours say what the weights become; most of vLLM's, what they are."""
    if text in _STORED_AS:
        return Effect(_set(model__stored_as=_STORED_AS[text]))
    way_out = (
        f"or what the model's files are, {', '.join(_STORED_AS)}; otherwise take its unquantised "
        "weights or a GGUF file"
    )
    return _one_of("model__quantization", _QUANTIZATIONS, way_out)(text)


_DTYPES = MappingProxyType(
    {word: word for word in ("auto", "float32", "bfloat16", "float16")}
    | {"half": "float16", "float": "float32"}
)
_QUANTIZATIONS = MappingProxyType(
    {word: word for word in ("auto", *get_args(Quantization))} | {"None": "none"}
)
_STORED_AS = MappingProxyType(
    {word: word for word in get_args(StoredAs) if word != "any"}
    | {"awq_marlin": "awq", "gptq_marlin": "gptq"}  # the same files by another kernel of vLLM's
)
_KV_DTYPES = MappingProxyType(
    {word: word for word in ("auto", "int8", "fp8")} | {"fp8_e4m3": "fp8"}
)
_PARALLEL = "more workers: --prefill N and --decode N; a large model: --tensor-parallel-size N"
_LOGGED = "requests are not logged"
_ALWAYS_CHUNKED = "prompts are always computed in chunks (--set prefill.chunk_tokens=N)"
_ALL_ADAPTERS = "every worker has all adapters in memory"
_EXPERTS = "with --tensor-parallel-size every process has a part of each expert"
_OWN_BUCKETS = "decode steps of any context are captured, each when it first occurs"

_ALL = (
    Flag("--model", _text("model__source")),
    Flag("--revision", _text("model__revision")),
    Flag("--served-model-name", _served_name, takes=None),
    Flag("--max-model-len", _context),
    Flag("--max-num-batched-tokens", _batched_tokens),
    Flag("--max-num-seqs", _sets("decode__running_max")),
    Flag("--lora-modules", _adapters, takes=None),
    Flag("--max-lora-rank", _sets("model__adapter_rank_max")),
    Flag("--block-size", _sets("model__block_tokens")),
    Flag("--kv-cache-memory-bytes", _sets("prefill__pool_bytes", "decode__pool_bytes")),
    Flag("--num-gpu-blocks-override", _sets("prefill__pool_blocks", "decode__pool_blocks")),
    Flag("--dtype", _one_of("model__dtype", _DTYPES, "take auto")),
    Flag("--quantization", _quantization),
    Flag(
        "--kv-cache-dtype",
        _one_of("model__kv_dtype", _KV_DTYPES, "take auto, or int8 on a CPU and fp8 on a GPU"),
    ),
    Flag(
        "--device",
        _one_of("model__device", {word: word for word in ("auto", "cpu", "cuda")}, "leave it out"),
    ),
    Flag(
        "--reasoning-parser",
        _one_of(
            "gateway__reasoning_parser",
            {style: style for style in get_args(ReasoningStyle)},
            "leave it out to get the model's text as it is",
        ),
    ),
    Flag(
        "--scheduling-policy",
        _one_of(
            "router__policy",
            {"fcfs": "fcfs"},
            "for priorities leave it out and send service_tier with the requests",
        ),
    ),
    Flag(
        "--no-enable-prefix-caching",
        lambda _: Effect(
            _set(store__offload=False),
            "the store keeps no prefixes; those still in a worker's own memory are used, for the "
            "same answers",
        ),
        takes=0,
    ),
    Flag("--enable-prefix-caching", _idle("prefixes are always kept"), takes=0),
    Flag("--enable-chunked-prefill", _idle(_ALWAYS_CHUNKED), takes=0),
    Flag("--no-enable-chunked-prefill", _idle(_ALWAYS_CHUNKED), takes=0),
    Flag(
        "--gpu-memory-utilization",
        _idle("a worker's KV memory is --set prefill.pool_bytes=N and --set decode.pool_bytes=N"),
    ),
    Flag("--swap-space", _idle("KV blocks leave for the store: --set store.arena_bytes=N")),
    Flag("--enable-lora", _idle("the adapters of --lora-modules are loaded"), takes=0),
    Flag("--max-loras", _idle("any of the adapters may share a batch")),
    Flag("--max-cpu-loras", _idle(_ALL_ADAPTERS)),
    Flag("--lora-dtype", _only("auto", way_out="an adapter is computed in the model's dtype")),
    Flag("--seed", _idle("a seed belongs to a request: send it with each")),
    Flag("--max-logprobs", _logprobs),
    Flag("--guided-decoding-backend", _idle("llguidance follows all constraints")),
    Flag("--enforce-eager", lambda _: Effect(_set(model__cuda_graphs="off")), takes=0),
    Flag("--no-enforce-eager", lambda _: Effect(_set(model__cuda_graphs="auto")), takes=0),
    Flag("--max-seq-len-to-capture", _idle(_OWN_BUCKETS)),
    Flag("--compilation-config", _idle(_OWN_BUCKETS)),
    Flag("--async-scheduling", lambda _: Effect(_set(decode__step_ahead=True)), takes=0),
    Flag("--no-async-scheduling", lambda _: Effect(_set(decode__step_ahead=False)), takes=0),
    Flag("--enable-expert-parallel", _idle(_EXPERTS), takes=0),
    Flag("--trust-remote-code", _idle("no code of a model's repository is ever run"), takes=0),
    Flag("--disable-log-requests", _idle(_LOGGED), takes=0),
    Flag("--no-enable-log-requests", _idle(_LOGGED), takes=0),
    Flag("--disable-log-stats", _idle("figures are at /metrics, not in the log"), takes=0),
    Flag("--disable-uvicorn-access-log", _idle(_LOGGED), takes=0),
    Flag("--disable-custom-all-reduce", _idle("sums have an order of ours"), takes=0),
    Flag("--distributed-executor-backend", _idle("Ray places and starts the workers")),
    Flag("--enable-reasoning", _idle("--reasoning-parser says it all"), takes=0),
    Flag("--tensor-parallel-size", _sets("prefill__tensor_parallel", "decode__tensor_parallel")),
    Flag("--pipeline-parallel-size", _only("1", way_out=f"for more throughput {_PARALLEL}")),
    Flag("--data-parallel-size", _only("1", way_out=f"instead {_PARALLEL}")),
    Flag("--cpu-offload-gb", _only("0", way_out="a model's weights must fit into its device")),
    Flag(
        "--generation-config",
        _only("vllm", way_out="send the model's sampling parameters with the requests"),
    ),
    Flag("--tokenizer-mode", _only("auto", way_out="leave it out")),
    Flag(
        "--load-format",
        _only("auto", "safetensors", "gguf", way_out="give MODEL as safetensors or as a GGUF file"),
    ),
    Flag(
        "--api-key",
        _refuse(
            "keys are kept as digests: pdserve keys add NAME --file KEYS.json, and "
            "--set gateway.api_keys=KEYS.json"
        ),
        takes=None,
    ),
    Flag("--ssl-certfile", _sets("gateway__tls_certificate")),
    Flag("--ssl-keyfile", _sets("gateway__tls_key")),
    Flag("--ssl-ca-certs", _sets("gateway__tls_client_authority")),
    Flag(
        "--tool-call-parser",
        _one_of(
            "gateway__tool_call_parser",
            {style: style for style in get_args(ToolCallStyle)},
            "leave it out and parse the text",
        ),
    ),
    Flag("--enable-auto-tool-choice", _idle("calls are always told apart"), takes=0),
    Flag("--speculative-config", _speculation),
    Flag("--pooler-config", _pooling),
    Flag("--override-pooler-config", _pooling),
    Flag("--tokenizer", _refuse("put the tokeniser's files beside the model's")),
    Flag("--chat-template", _refuse("put chat_template.jinja beside the model's files")),
)

FLAGS: Mapping[str, Flag] = MappingProxyType({flag.name: flag for flag in _ALL})

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "-q": "--quantization",
        "-tp": "--tensor-parallel-size",
        "-pp": "--pipeline-parallel-size",
        "-dp": "--data-parallel-size",
    }
)


# ── before the command's own parser ──────────────────────────────────────────────────────────────


class ServeCommand(TyperCommand):
    """Takes vLLM's flags as well as its own; the help shows its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer hides its base's class
        """Leaves what is to be said of the flags in ``ctx.meta[NOTES]``.

        Raises:
            ConfigError: also for a flag that nobody knows.
        """
        translated = translate(args)
        ctx.meta[NOTES] = translated.notes
        own = {
            name
            for parameter in self.get_params(ctx)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        for word in itertools.takewhile(lambda word: word != "--", translated.words):
            name = word.partition("=")[0]
            if name.startswith("--") and name not in own:
                known = sorted({*(name for name in own if name.startswith("--")), *FLAGS})
                raise ConfigError(
                    f"{name} is no flag of pdserve serve; {nearest(name, known)} Elsewhere: "
                    "`pdserve serve --help`, docs/from_vllm.md, and --set for every setting"
                )
        return super().parse_args(ctx, list(translated.words))
