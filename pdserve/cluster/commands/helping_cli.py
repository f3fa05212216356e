"""The command line's ``completion`` and ``support-bundle``: help for who types, and who helps.

Nothing heavy is imported up here, as in ``cli``.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from pdserve.cluster.commands.kv_cli import DEFAULT_URL, Nodes, Url
from pdserve.errors import ConfigError

PROGRAM = "pdserve"
SHELLS = ("bash", "zsh", "fish")


def completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print what makes the shell complete our commands: source it from the shell's own settings."""
    print(completion_script(shell))


def completion_script(shell: str) -> str:
    """Typer's own script; the shell asks ``pdserve`` itself what may come next.

    Raises:
        ConfigError: no such shell is known.
    """
    from typer import completion as ours

    if shell not in SHELLS:
        raise ConfigError(f"shell is {shell!r}, must be one of {', '.join(SHELLS)}")
    script: Any = ours.get_completion_script  # type: ignore[attr-defined]
    return str(
        script(prog_name=PROGRAM, complete_var=f"_{PROGRAM.upper()}_COMPLETE", shell=shell)
    ).strip()


def support_bundle(
    out: Annotated[Path | None, typer.Option(help="A new file; default: by date.")] = None,
    url: Url = DEFAULT_URL,
    config: Annotated[
        Path | None, typer.Option(help="The CONFIG.yaml that the cluster was started with.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting: part.field=value.")
    ] = None,
    nodes: Nodes = None,
    logs: Annotated[
        list[Path] | None, typer.Option("--logs", help="Directories; default: Ray's on this host.")
    ] = None,
    doctor: Annotated[
        bool, typer.Option(help="Ask the doctor too, who loads torch; up to 90 s.")
    ] = True,
    seconds: Annotated[float, typer.Option(help="In all.")] = 120.0,
) -> None:
    """Gather what somebody needs to help you into one archive, without keys and clients' texts."""
    from pdserve.cluster.commands.support import support_bundle as gather
    from pdserve.settings import load

    given = assignments or []
    as_doctor_takes_them = [str(config)] if config else []
    for assignment in given:
        as_doctor_takes_them += ["--set", assignment]
    gather(
        load(config, assignments=given),
        out=out,
        url=url,
        nodes=nodes or [],
        log_directories=logs or [],
        doctor_arguments=as_doctor_takes_them if doctor else None,
        seconds_max=seconds,
    )
