"""PromQL as far as dashboards use it: is an expression well formed, and which metrics does it ask
for? A recursive descent over the grammar of Prometheus' documentation; no values are computed.

    parse('sum by (le) (rate(ttft_bucket{model="$m"}[1m]))')  ──►  {"ttft_bucket"}
"""

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<duration>\d+(?:ms|[smhdwy])(?:\d+(?:ms|[smhdwy]))*)
    | (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<name>[a-zA-Z_][\w:]*)
    | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<sign>=~|!~|!=|==|<=|>=|[-+*/%^<>=(){}\[\],:@])
    )""",
    re.VERBOSE,
)

_AGGREGATIONS = frozenset(
    [
        "sum",
        "min",
        "max",
        "avg",
        "count",
        "stddev",
        "stdvar",
        "group",
        "topk",
        "bottomk",
        "quantile",
        "count_values",
    ]
)
_PARAMETRIC = frozenset(["topk", "bottomk", "quantile", "count_values"])
_FUNCTIONS = frozenset(
    [
        "abs",
        "absent",
        "avg_over_time",
        "ceil",
        "clamp",
        "clamp_max",
        "clamp_min",
        "count_over_time",
        "delta",
        "deriv",
        "floor",
        "histogram_quantile",
        "increase",
        "irate",
        "label_replace",
        "last_over_time",
        "max_over_time",
        "min_over_time",
        "quantile_over_time",
        "rate",
        "round",
        "scalar",
        "sort",
        "sort_desc",
        "sum_over_time",
        "time",
        "vector",
    ]
)
_BINARY: tuple[tuple[str, ...], ...] = (
    ("or",),
    ("and", "unless"),
    ("==", "!=", "<=", ">=", "<", ">"),
    ("+", "-"),
    ("*", "/", "%"),
    ("^",),
)
"""From the loosest to the tightest."""

_MATCHING = frozenset({"on", "ignoring"})
_GROUPING = frozenset({"by", "without"})


class BadExpression(ValueError):
    """Says what was expected, and before what."""


def metrics_in(expression: str) -> set[str]:
    """The metrics that an expression asks for. Raises BadExpression where Prometheus would."""
    parser = _Parser(_tokens(expression))
    parser.binary(0)
    if parser.kind != "end":
        raise BadExpression(f"{parser.text!r} after the end of {expression!r}")
    return parser.metrics


def _tokens(expression: str) -> list[tuple[str, str]]:
    tokens, at = [], 0
    expression = expression.rstrip()
    while at < len(expression):
        found = _TOKEN.match(expression, at)
        if found is None:
            raise BadExpression(f"{expression[at : at + 20]!r} is no token")
        assert found.lastgroup is not None
        tokens.append((found.lastgroup, found.group(found.lastgroup)))
        at = found.end()
    return [*tokens, ("end", "")]


@dataclass
class _Parser:
    tokens: list[tuple[str, str]]
    at: int = 0
    metrics: set[str] = field(default_factory=set)

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    @property
    def text(self) -> str:
        return self.tokens[self.at][1]

    def binary(self, level: int) -> None:
        if level == len(_BINARY):
            self._unary()
            return
        self.binary(level + 1)
        while self.kind in ("sign", "name") and self.text in _BINARY[level]:
            self.at += 1
            if self.text == "bool":
                self.at += 1
            if self.text in _MATCHING:
                self._names_after()
                if self.text in ("group_left", "group_right"):
                    self._names_after()
            self.binary(level + 1)

    def _unary(self) -> None:
        while self.kind == "sign" and self.text in "+-":
            self.at += 1
        self._atom()
        while True:
            if self._take("["):
                self._expect("duration")
                if self._take(":") and self.kind == "duration":  # a subquery
                    self.at += 1
                self._sign("]")
            elif self.text == "offset":
                self.at += 1
                self._take("-")
                self._expect("duration")
            else:
                return

    def _atom(self) -> None:
        if self._take("("):
            self.binary(0)
            self._sign(")")
        elif self.kind in ("number", "string"):
            self.at += 1
        elif self.kind == "name" and self.text in _AGGREGATIONS:
            self._aggregation()
        elif self.kind == "name" and self.tokens[self.at + 1] == ("sign", "("):
            self._call()
        elif self.kind == "name" or self.text == "{":
            self._selector()
        else:
            raise BadExpression(f"an expression is expected before {self.text!r}")

    def _aggregation(self) -> None:
        parameters = 2 if self.text in _PARAMETRIC else 1
        self.at += 1
        if self.text in _GROUPING:
            self._names_after()
        self._arguments(parameters)
        if self.text in _GROUPING:
            self._names_after()

    def _call(self) -> None:
        if self.text not in _FUNCTIONS:
            raise BadExpression(f"{self.text!r} is no function known here")
        self.at += 1
        self._arguments(None)

    def _arguments(self, count: int | None) -> None:
        self._sign("(")
        found = 0
        while self.text != ")":
            found += 1
            self.binary(0)
            if self.text != ")":
                self._sign(",")
        self._sign(")")
        if count is not None and found != count:
            raise BadExpression(f"{found} arguments, {count} are expected")

    def _selector(self) -> None:
        if self.kind == "name":
            self.metrics.add(self.text)
            self.at += 1
        if self._take("{"):
            while self.text != "}":
                self._expect("name")
                if self.text not in ("=", "!=", "=~", "!~"):
                    raise BadExpression(f"a matcher is expected before {self.text!r}")
                self.at += 1
                self._expect("string")
                if self.text != "}":
                    self._sign(",")
            self._sign("}")

    def _names_after(self) -> None:
        """A keyword and a list of labels."""
        self.at += 1
        if self._take("("):
            while self.text != ")":
                self._expect("name")
                if self.text != ")":
                    self._sign(",")
            self._sign(")")

    def _take(self, sign: str) -> bool:
        there = self.tokens[self.at] == ("sign", sign)
        self.at += there
        return there

    def _sign(self, sign: str) -> None:
        if not self._take(sign):
            raise BadExpression(f"{sign!r} is expected before {self.text!r}")

    def _expect(self, kind: str) -> None:
        if self.kind != kind:
            raise BadExpression(f"a {kind} is expected before {self.text!r}")
        self.at += 1
