"""Between characters and token ids: everything a request needs before and after the model.

In: messages or text from a client. ``chat`` renders messages into one text, ``tokenizer`` turns
text into token ids. Out: token ids from decode. ``detokenizer`` turns them back into text as they
come, ``stops`` finds where a stop string ends the answer, ``grammar`` says which tokens keep an
answer within what was asked of it.

Nothing here knows a tensor, a socket or a request. Start with ``tokenizer``; ``gguf_metadata`` and
``gguf_tokenizer`` are how it reads the one-file format.
"""
