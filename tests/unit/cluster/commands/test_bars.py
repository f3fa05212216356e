import io

from rich.console import Console

from pdserve.cluster.commands.bars import bar, spinner


def test_where_nobody_looks_nothing_is_written() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False)
    with bar("simulating", console, total=2) as step:
        step()
    with spinner("measuring", console) as say:
        say("still measuring")
    assert out.getvalue() == ""


def test_on_a_terminal_it_shows_how_far_it_is_and_goes_when_it_is_done() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with bar("simulating", console, total=2) as step:
        step()
        step()
        console.print("a line")
    said = out.getvalue()
    assert "simulating" in said
    assert "2/2" in said
    assert "a line" in said
    assert said.endswith("\x1b[2K")  # the bar's line is empty at the end
