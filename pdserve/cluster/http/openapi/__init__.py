"""The OpenAPI document of the HTTP front, written by hand and held to the truth by schemathesis:
what clients send (``bodies``), what they get (``answers``), and the operations (``document``)."""
