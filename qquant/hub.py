"""Publishing a quantized directory on the Hugging Face hub, through `huggingface_hub`.

The directory is verified first, and nothing goes that is not part of it: no hidden file, no work
directory, no link that leaves it. Large files are sent one after another, each kept by the hub as
soon as it is complete, and one commit at the end makes them all visible at once: a repository never
shows half a model, and the same command after an interruption sends only what is missing (the hub
knows contents by their hash). The same commit takes away what an earlier upload left there and a
reader would take instead: weights, their index, a quantization config; those of somebody else's
upload only when told to.

The token is huggingface_hub's own business (`hf auth login` or `HF_TOKEN`); it is never read here
and never printed. What the hub answers becomes one line with the cure.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .checkpoint import QUANTIZE_CONFIGS
from .directory import contained, find_directory
from .errors import (
    InputError,
    MissingDependencyError,
    QQuantError,
    RunError,
    SpecError,
    VerifyError,
)
from .manifest import NAME as MANIFEST
from .report import human_bytes, text_table

Say = Callable[[str], None]
# Narrower than git's rules (git-check-ref-format): letters, digits and . _ - in parts between /.
_PIECE = r"\w(?:[\w.-]*[\w-])?"
_BRANCH = re.compile(rf"(?!.*(?:\.\.|\.lock(?:/|$))){_PIECE}(?:/{_PIECE})*", re.ASCII)
# Of an earlier upload, these are read before or beside ours, by transformers or by servers.
_STALE = re.compile(
    r"model[^/]*\.safetensors|model[^/]*\.safetensors\.index\.json|pytorch_model[^/]*\.bin(?:\.index\.json)?"
    rf"|{'|'.join(map(re.escape, QUANTIZE_CONFIGS))}"
)
_AGAIN = "The same command goes on: what is sent is not sent again"


@dataclass(frozen=True)
class Plan:
    """What goes where.

    Attributes:
        path: the directory. repo: `NAMESPACE/NAME`. revision: a branch; None for the main one.
        files: `(name within the directory, bytes)`, by name.
        left_out: names that do not go.
    """

    path: Path
    repo: str
    revision: str | None
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    def render(self) -> str:
        """For a person: every file, and the sum."""
        rows = [(name, human_bytes(size)) for name, size in self.files]
        where = self.repo + (f", branch {self.revision}" if self.revision else "")
        lines = [text_table(("file", "size"), rows), ""]
        lines += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([*lines, f"{len(rows)} files, {human_bytes(self.total)}, to {where}"])

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "path": str(self.path),
            "repo": self.repo,
            "revision": self.revision,
            "files": [{"name": name, "bytes": size} for name, size in self.files],
            "left_out": list(self.left_out),
            "bytes": self.total,
        }


def plan_push(path: str | os.PathLike[str], repo: str, revision: str | None = None) -> Plan:
    """What `push` would send; no network.

    Raises:
        CheckpointError: there is no such directory, or a file of it is a link that leaves it.
        SpecError: `repo` is no name of a repository, or `revision` none of a branch.
        MissingDependencyError: huggingface_hub is not installed.
    """
    root = find_directory(path)
    _check_name(repo)
    if revision is not None and not _BRANCH.fullmatch(revision):
        raise SpecError("--revision", expected="a name of a branch", got=repr(revision))
    files, left_out = [], []
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root).as_posix()
        if _is_work(name):
            left_out.append(name)
        elif file.is_file() or file.is_symlink():
            files.append((name, contained(root, name).stat().st_size))
    tops = [n for n in left_out if not any(n.startswith(f"{other}/") for other in left_out)]
    return Plan(root, repo, revision, tuple(files), tuple(tops))


def _is_work(name: str) -> bool:
    """Whether a file is not of the model: hidden, as work directories and caches are, or a cache of
    Python's."""
    return any(part.startswith(".") or part == "__pycache__" for part in PurePosixPath(name).parts)


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    revision: str | None = None,
    create: bool = False,
    private: bool = False,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> str:
    """Verifies the directory and uploads it; gives the address of the commit.

    Args:
        repo: `NAMESPACE/NAME`. revision: a branch; the main one without it.
        create: make repository and branch where they are not there. private: make it private; one
            that is there has to be.
        overwrite: take weights away that qquant did not upload and a reader would take instead.
        say: told what is going on.

    Raises:
        InputError: the directory, the name or the token cannot be used, the repository is not
            there, or has weights of another upload; nothing was made visible.
        VerifyError: the directory is not what it claims to be; nothing was sent.
        RunError: the network or the hub failed on the way.
    """
    plan = plan_push(path, repo, revision)
    if private and not create:
        raise SpecError(
            "--private",
            expected="--create beside it",
            got="no --create",
            cure="A repository that is there keeps its visibility: leave --private out, or give "
            "--create",
        )
    check(plan.path)
    hub = _library()
    if hub.get_token() is None:
        raise InputError("token of the hub", expected="one", got="none", cure=_LOGIN)
    try:
        with _bars():
            return _send(hub, plan, create, private, overwrite, say)
    except QQuantError:
        raise
    except Exception as error:
        raise _told(error, plan) from error


@contextmanager
def _bars() -> Iterator[None]:
    """huggingface_hub's progress bars, on a terminal only; in a log they would be noise."""
    from huggingface_hub import utils

    if sys.stderr.isatty() or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


_LOGIN = "hf auth login, or set HF_TOKEN to a token that may write"


def check(path: Path) -> None:
    """Refuses a directory that `verify` finds something wrong with.

    Raises:
        VerifyError: naming the first problem.
    """
    from .verify import verify

    if problems := verify(path).problems:
        first = problems[0]
        raise VerifyError(
            f"{path}: {first.key}",
            expected=first.expected,
            got=first.got,
            cure=f"`qquant verify` shows all {len(problems)} problems; nothing was sent",
        )


def _send(hub: Any, plan: Plan, create: bool, private: bool, overwrite: bool, say: Say) -> str:
    api = hub.HfApi(library_name="qquant")
    if create:
        api.create_repo(plan.repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(plan.repo).private:
            raise InputError(
                f"--private: repository {plan.repo}",
                expected="private, or not there yet",
                got="one that is there and public",
                cure="Make it private on the hub first, or leave --private out",
            )
        if plan.revision:
            api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
    ours = {name for name, _ in plan.files}
    there = api.list_repo_files(plan.repo, revision=plan.revision)
    stale = [name for name in sorted(there) if name not in ours and _STALE.fullmatch(name)]
    if stale and MANIFEST not in there and not overwrite:
        raise InputError(
            f"repository {plan.repo}",
            expected="no weights or quantization configs but beside a manifest of qquant's",
            got=f"{', '.join(stale[:3])}{', ...' if len(stale) > 3 else ''}, which readers would "
            "take instead",
            cure="Give another repository, or --overwrite to take them away in the same commit",
        )
    operations = [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(plan.path / name))
        for name, _ in plan.files
    ]
    for number, (operation, (name, size)) in enumerate(
        zip(operations, plan.files, strict=True), start=1
    ):
        say(f"{number}/{len(operations)} {name}, {human_bytes(size)}")
        api.preupload_lfs_files(
            plan.repo, additions=[operation], revision=plan.revision, free_memory=False
        )
    for name in stale:
        say(f"takes {name} away, of an earlier upload")
    say("commit")
    made = api.create_commit(
        plan.repo,
        operations=[*operations, *(hub.CommitOperationDelete(name) for name in stale)],
        commit_message="Upload a quantized model with qquant",
        revision=plan.revision,
    )
    return str(made.commit_url)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(
            "push", expected="huggingface_hub", got="none", cure="pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _check_name(repo: str) -> None:
    _library()
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        good = repo.count("/") == 1
    except ValueError:
        good = False
    if not good:
        raise SpecError(
            "REPO", expected="NAMESPACE/NAME", got=repr(repo), cure="Such as me/Qwen-7B-Chat-Int4"
        )


def _told(error: BaseException, plan: Plan) -> QQuantError:
    """What went wrong on the way, in one line with the cure."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for found in chain:
        status = getattr(getattr(found, "response", None), "status_code", None)
        if status == 401:
            return InputError(
                f"repository {plan.repo}",
                expected="a token that the hub accepts, and a repository that is there",
                got="401",
                cure=f"{_LOGIN}; or give --create, if the repository is not there yet",
            )
        if status == 403:
            return InputError(
                f"repository {plan.repo}",
                expected="a token that may write there",
                got="403",
                cure="Make a token with write permission for that namespace, or give one of yours",
            )
        if status == 404:
            where = plan.repo + (f", branch {plan.revision}" if plan.revision else "")
            return InputError(
                f"repository {where}",
                expected="to be there, and visible to your token",
                got="404",
                cure="Give --create to make it, or check the name",
            )
        if isinstance(status, int):
            return RunError(f"the hub answered {status}", got=_line(found), cure=_AGAIN)
    for found in chain:
        if isinstance(found, ConnectionError) or type(found).__name__ in _UNREACHED:
            return RunError(
                "the hub", expected="a connection", got=_line(found) or "none", cure=_AGAIN
            )
    told = " ".join(dict.fromkeys(_line(found).rstrip(".") for found in (error, chain[-1])))
    return RunError(f"sending {plan.path.name}", got=told, cure=_AGAIN)


# Of whichever HTTP library this huggingface_hub is built on.
_UNREACHED = (
    *("ConnectError", "ConnectTimeout", "ReadError", "ReadTimeout", "WriteError", "WriteTimeout"),
    *("RemoteProtocolError", "NetworkError", "TimeoutException", "PoolTimeout", "ProxyError"),
)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
