"""Several texts in Prometheus' format as one. Pure.

The format wants all samples of a family in one group below its one head. Each model of a gateway
has figures in the same families, so texts that follow one another would repeat the heads.
"""

from collections.abc import Sequence

_HEADS = ("# HELP ", "# TYPE ")


def joined(texts: Sequence[str]) -> str:
    """The families in the order in which they first come, each with the samples of all texts.

    Args:
        texts: as ``prometheus_client`` writes them: HELP, if there is one, and TYPE before the
            samples of a family.
    """
    if len(texts) == 1:
        return texts[0]
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith(_HEADS):
                family = line.split(" ", 3)[2]
                if line not in heads.setdefault(family, []):
                    heads[family].append(line)
            elif line:
                samples.setdefault(family, []).append(line)
    order = dict.fromkeys([*heads, *samples])
    return "".join(
        f"{line}\n"
        for family in order
        for line in [*heads.get(family, ()), *samples.get(family, ())]
    )
