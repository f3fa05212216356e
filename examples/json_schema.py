"""An answer that is a Python object: the schema of a class constrains every token."""

import os
from typing import Annotated

import openai
from pydantic import BaseModel, ConfigDict, Field


class Book(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: Annotated[str, Field(max_length=40)]
    year: Annotated[int, Field(ge=1400, le=2100)]


def main() -> None:
    url = os.environ.get("PDSERVE_URL", "http://127.0.0.1:8000")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    answer = client.chat.completions.parse(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "Name a book about the sea, as JSON."}],
        response_format=Book,
        temperature=0,
        max_tokens=400,
    )
    book = answer.choices[0].message.parsed
    assert book is not None
    print(f"{book.title!r}, {book.year}")


if __name__ == "__main__":
    main()
