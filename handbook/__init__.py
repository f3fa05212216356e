"""The documentation site: ``python -m handbook`` builds it, ``make docs`` says so shorter.

In flow what people wrote (``docs/``, the README, the changelog) and what is true already (settings,
OpenAPI, protocol files, command line, docstrings, results of benchmarks and of client tests); out
comes ``build/docs``, Markdown, and from it ``build/site``, HTML that needs no network to be read.
Start with ``staging``.
"""
