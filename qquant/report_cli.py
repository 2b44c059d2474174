"""What happens to a profile once it is there: `report`, `card`, `push`, `compare`.

Light, like all verbs: what is heavy is imported inside.
"""

from __future__ import annotations

from pathlib import Path

import click

from .console import library_log, termination
from .options import common, json_option
from .progress import dump


@click.command(short_help="Write the reports of a profile anew.")
@click.argument("profile", type=click.Path(path_type=Path), metavar="PROFILE")
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    default=None,
    show_default="beside PROFILE",
    metavar="DIR",
    help="Gets REPORT.md, report.html and the charts.",
)
@common
def report(profile: Path, out: Path | None) -> None:
    """Write REPORT.md, the HTML page and the PNG charts of PROFILE, a profile.json.

    `qquant profile` does the same at its end; this needs neither the models nor their machine.

    \b
    Example:
      qquant report profile/profile.json -o public
    """
    with library_log() as _:
        from .profile_report import write_reports
        from .reporting.schema import read_profile

        found = read_profile(profile)
        for path in write_reports(out or profile.parent, found):
            click.echo(path)


@click.command(short_help="Put what was measured into the model card.")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DST")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PROFILE",
    help="A profile.json in which DST was measured.",
)
@click.option(
    "--name",
    default=None,
    show_default="the one with DST's weights",
    metavar="MODEL",
    help="DST's name in the profile.",
)
@json_option
@common
def card(directory: Path, profile: Path, name: str | None, as_json: bool) -> None:
    """Put tables, charts and results of a profile into the model card of the directory DST.

    Replaces what an earlier profile put there and keeps everything else; hashes follow, so that
    `qquant verify` is as content as before. A profile of other weights is refused.

    \b
    Example:
      qquant card Qwen-7B-Chat-Int4 --profile profile/profile.json
    """
    with termination(), library_log() as _:
        from .profile_card import write_profile_card

        made = write_profile_card(directory, profile, name)
    if as_json:
        click.echo(dump(made.to_dict()))
    elif made.written:
        click.echo(f"{directory}: {made.model} measured; wrote {', '.join(made.written)}")
    else:
        click.echo(f"{directory}: nothing to change, the card has this profile of {made.model}")


@click.command(short_help="Upload a directory to the Hugging Face hub.")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DST")
@click.argument("repo", metavar="NAMESPACE/NAME")
@click.option(
    "--dry-run", is_flag=True, help="Show every file that would go; no network is touched."
)
@click.option("--create", is_flag=True, help="Make the repository (and branch) if it is not there.")
@click.option("--private", is_flag=True, help="With --create: nobody else can see it.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Take weights away that qquant did not upload and readers would take instead.",
)
@click.option(
    "--revision", default=None, show_default="main", metavar="BRANCH", help="The branch to write."
)
@json_option
@common
def push(
    directory: Path,
    repo: str,
    dry_run: bool,
    create: bool,
    private: bool,
    overwrite: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Verify the directory DST and upload it to the repository NAMESPACE/NAME.

    All files become visible at once, by one commit at the end. After an interruption the same
    command goes on: what was sent is not sent again. Work directories and hidden files never go.
    The token is that of `hf auth login`, or HF_TOKEN.

    \b
    Examples:
      qquant push Qwen-7B-Chat-Int4 me/Qwen-7B-Chat-Int4 --dry-run
      qquant push Qwen-7B-Chat-Int4 me/Qwen-7B-Chat-Int4 --create --private
    """
    with termination(), library_log() as hush:
        from . import hub

        plan = hub.plan_push(directory, repo, revision)
        if dry_run:
            hub.check(plan.path)
            click.echo(dump(plan.to_dict()) if as_json else plan.render())
            return
        hush()
        url = hub.push(
            directory,
            repo,
            revision=revision,
            create=create,
            private=private,
            overwrite=overwrite,
            say=lambda text: click.echo(text, err=True),
        )
    click.echo(dump(plan.to_dict() | {"commit": url}) if as_json else url)


@click.command(short_help="Say what changed between two profiles.")
@click.argument("before", type=click.Path(path_type=Path), metavar="A.json")
@click.argument("after", type=click.Path(path_type=Path), metavar="B.json")
@json_option
@common
def compare(before: Path, after: Path, as_json: bool) -> None:
    """Say what changed from the profile A.json to the profile B.json.

    First what makes figures hard to compare: another machine, other versions, another protocol.
    Then, of each model that is in both, every figure that changed, with the interval of the
    difference where errors are known, and whether that is outside noise.

    \b
    Example:
      qquant compare before/profile.json after/profile.json
    """
    with library_log() as _:
        from .reporting import changes
        from .reporting.schema import read_profile

        found = changes.compare(read_profile(before), read_profile(after))
    click.echo(dump(found.to_dict()) if as_json else found.render())
