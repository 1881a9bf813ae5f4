"""Reads the list of a corpus's packages, and fetches their archives with the ordinary clients."""

import dataclasses
import hashlib
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

LIST = pathlib.Path(__file__).with_name("packages.txt")

# Wheels are chosen for one fixed platform, so that every machine fetches the same file.
_PYTHON = ("--only-binary=:all:", "--python-version=3.12")
_LINUX = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_PIP_OPTIONS = {
    "wheel": (*_PYTHON, "--implementation=py", "--abi=none", "--platform=any"),
    "binary": (
        *_PYTHON,
        "--implementation=cp",
        "--abi=cp312",
        "--abi=abi3",
        *(f"--platform={name}" for name in _LINUX),
    ),
    "sdist": (
        "--ignore-requires-python",
    ),  # and --no-binary for this package, not for its build tools
}
KINDS = (*_PIP_OPTIONS, "deb")


class CorpusError(Exception):
    """A list, a download or a corpus is wrong; the message is for the person at the terminal."""


@dataclasses.dataclass(frozen=True)
class Package:
    """One line of the list.

    Attributes:
      name: as the registry spells it.
      version: pinned.
      kind: "wheel" (pure Python), "binary" (a wheel for Linux x86-64 and CPython 3.12), "sdist", or "deb".
      suffixes: of the files taken, such as (".py", ".rst").
    """

    name: str
    version: str
    kind: str
    suffixes: tuple[str, ...]

    def __post_init__(self):
        for value in (self.name, self.version):
            if not re.fullmatch(r"\w[\w.+:~-]*", value):
                raise ValueError(f"{value!r} is no name or version of a package.")
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} must be one of {', '.join(KINDS)}.")
        wrong = [suffix for suffix in self.suffixes if not re.fullmatch(r"(\.\w+)+", suffix)]
        if wrong or not self.suffixes:
            raise ValueError(f"suffix {''.join(wrong[:1])!r} must look like .py")

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def find(self, folder: pathlib.Path) -> pathlib.Path | None:
        """Returns the archive of this package in a folder, None if there is none."""
        # Archives spell My.Name as my_name, My.Name or my-name.
        name = "[-_.]+".join(map(re.escape, re.split("[-_.]+", self.name)))
        version = re.escape(self.version.replace(":", "%3a"))
        pattern = {
            "wheel": rf"{name}-{version}-.*none-any\.whl",
            "binary": rf"{name}-{version}-.*\.whl",
            "sdist": rf"{name}-{version}\.(tar\.gz|zip)",
            "deb": rf"{name}_{version}_\w+\.deb",
        }[self.kind]
        for path in sorted(folder.iterdir()):
            if re.fullmatch(pattern, path.name, re.IGNORECASE):
                return path
        return None

    def command(self, folder: str) -> list[str]:
        """Returns the command that fetches the archive into `folder`, to be run there."""
        if self.kind == "deb":
            return ["apt-get", "download", f"{self.name}={self.version}"]
        options = _PIP_OPTIONS[self.kind]
        if self.kind == "sdist":
            options = (*options, f"--no-binary={self.name}")
        return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options,
                f"--dest={folder}", f"{self.name}=={self.version}"]  # fmt: skip

    def fetch(self, folder: pathlib.Path) -> pathlib.Path:
        """Returns the archive in `folder`; fetches it if it is not there.

        A download is moved into the folder when it is complete, so a run that was cut leaves no half archive.

        Raises:
          CorpusError: the client is missing or fails; names the package and the command.
        """
        found = self.find(folder)
        if found:
            return found
        if self.kind == "deb" and not shutil.which("apt-get"):
            raise CorpusError(
                f"{self}: apt-get is not installed here. Build on Debian, or copy the .deb into {folder}."
            )
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            command = self.command(partial)
            done = subprocess.run(command, cwd=partial, capture_output=True, text=True, check=False)
            archive = self.find(pathlib.Path(partial))
            if done.returncode or not archive:
                reason = (done.stderr.strip() or "no archive came").splitlines()[-1]
                raise CorpusError(f"{self}: `{shlex.join(command)}` failed: {reason}")
            return archive.rename(folder / archive.name)


def read_list(*paths: pathlib.Path) -> list[Package]:
    """Reads lists: `name version kind suffixes` a line, suffixes separated by commas, `#` comments.

    Raises:
      CorpusError: no such file, or a line that is not one; names file, line and value. A package stands
        there twice, in whatever version: both would write to the same folder.
    """
    packages = [package for path in paths for package in _read_one(path)]
    names = [package.name.lower() for package in packages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CorpusError(f"{', '.join(map(str, paths))}: {', '.join(twice)} is named twice.")
    return packages


def _read_one(path: pathlib.Path) -> list[Package]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise CorpusError(f"The list {path} cannot be read: {error.strerror}.") from error
    packages = []
    for number, line in enumerate(lines, 1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        if len(fields) != 4:
            raise CorpusError(f"{path}:{number}: {line!r} is not `name version kind suffixes`.")
        try:
            packages.append(Package(*fields[:3], tuple(fields[3].split(","))))
        except ValueError as error:
            raise CorpusError(f"{path}:{number}: {error}") from error
    if not packages:
        raise CorpusError(f"The list {path} names no package.")
    return packages


def sha256(path: pathlib.Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
