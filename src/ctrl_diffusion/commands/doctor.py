"""Define `ctrl doctor`."""

from typing import Annotated, Any

import typer

from .line import options as opt


def doctor(
    prior: Annotated[str | None, typer.Option(help="Folder, hub id, digits, letters.")] = None,
    data: opt.Datasets = [],  # noqa: B006
    control: opt.Controls = [],  # noqa: B006
    condition: opt.Conditions = [],  # noqa: B006
    classifier: opt.Classifiers = [],  # noqa: B006
    config: opt.Settings = None,
    override: opt.Override = [],  # noqa: B006
    prompts: Annotated[str | None, typer.Option(hidden=True)] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", hidden=True)] = False,
    image: opt.Image = None,
    missing: opt.Missing = None,
    trust: opt.HiddenTrust = False,
) -> None:
    """Say what is installed, what of prior and data is recognised, and what goes wrong first.

    To paste into an issue: no folders but by name. Options as for ctrl train. Exit code 0, whatever is found.
    """
    from .jobs.doctor import doctor_job

    def read() -> dict[str, Any]:
        options = {"prior": prior, "prompts": prompts}
        options |= opt.control_values(data, control, condition, classifier, skip_bad, image, missing)
        return opt.read_values(options, config, override, trust)

    typer.echo(doctor_job(read, trust).in_words())
