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
import urllib.error
import urllib.request

# Keeps every file that Debian has served, under its SHA-1.
SNAPSHOT = "https://snapshot.debian.org"
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
        version = re.escape(self.version.replace(":", "%3a"))
        return next((path for path in sorted(folder.iterdir()) if self._match(path, version)), None)

    def _match(self, path: pathlib.Path, version: str) -> re.Match | None:
        """Matches the name of an archive of this package; `version` is a regular expression."""
        # Archives spell My.Name as my_name, My.Name or my-name.
        name = "[-_.]+".join(map(re.escape, re.split("[-_.]+", self.name)))
        pattern = {
            "wheel": rf"{name}-({version})-.*none-any\.whl",
            "binary": rf"{name}-({version})-.*\.whl",
            "sdist": rf"{name}-({version})\.(tar\.gz|zip)",
            "deb": rf"{name}_({version})_\w+\.deb",
        }[self.kind]
        return re.fullmatch(pattern, path.name, re.IGNORECASE)

    def command(self, folder: str, newest: bool = False) -> list[str]:
        """Returns the command that fetches the archive into `folder`, to be run there."""
        if self.kind == "deb":
            return ["apt-get", "download", self.name if newest else f"{self.name}={self.version}"]
        options = _PIP_OPTIONS[self.kind]
        if self.kind == "sdist":
            options = (*options, f"--no-binary={self.name}")
        return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options,
                f"--dest={folder}", self.name if newest else f"{self.name}=={self.version}"]  # fmt: skip

    def fetch(
        self, folder: pathlib.Path, name: str | None = None, sha1: str | None = None
    ) -> pathlib.Path:
        """Returns the archive in `folder`; fetches it if it is not there.

        A download is moved into the folder when it is complete, so a run that was cut leaves no half archive.

        Args:
          folder: of the archives.
          name: of the archive file, where it is known.
          sha1: of a Debian archive, where it is known: what Debian serves no more comes from its snapshots.

        Raises:
          CorpusError: the client is missing or fails; names the package, the command and the way out.
        """
        found = self.find(folder)
        if found:
            return found
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            try:
                archive = self._run(pathlib.Path(partial))
            except CorpusError as error:
                if self.kind != "deb":
                    raise
                if not sha1 or not name:
                    raise CorpusError(
                        f"{error}. {SNAPSHOT}/binary/{self.name}/ has earlier versions: "
                        f"put the .deb into {folder}"
                    ) from error
                archive = pathlib.Path(partial) / name
                url = f"{SNAPSHOT}/file/{sha1}"
                try:
                    _download(url, archive)
                except (OSError, urllib.error.URLError) as reason:
                    raise CorpusError(
                        f"{error}; and {url}: {reason}. Once it can be reached: "
                        f"`{shlex.join(['curl', '--fail', '-o', str(folder / name), url])}`"
                    ) from error
            return archive.rename(folder / archive.name)

    def fetch_newest(self, folder: pathlib.Path) -> tuple["Package", pathlib.Path]:
        """Fetches the newest version that the client offers; returns it as a package, and its archive.

        Raises:
          CorpusError: as `fetch`.
        """
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            archive = self._run(pathlib.Path(partial), newest=True)
            version = self._match(archive, ".+?")[1].replace("%3a", ":")
            return dataclasses.replace(self, version=version), archive.rename(folder / archive.name)

    def _run(self, folder: pathlib.Path, newest: bool = False) -> pathlib.Path:
        """Runs the client in an empty folder, and returns the archive that came."""
        if self.kind == "deb" and not shutil.which("apt-get"):
            raise CorpusError(f"{self}: apt-get is not installed here, it needs Debian 12")
        command = self.command(str(folder), newest)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        archives = [path for path in folder.iterdir() if self._match(path, ".+?")]
        if done.returncode or not archives or not (newest or self.find(folder)):
            reason = (done.stderr.strip() or "no archive came").splitlines()[-1]
            raise CorpusError(f"{self}: `{shlex.join(command)}` failed: {reason}")
        return archives[0]


def _download(url: str, path: pathlib.Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "mhc_jax corpus"})
    with urllib.request.urlopen(request, timeout=60) as reply, path.open("wb") as file:
        shutil.copyfileobj(reply, file)


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


def digest(path: pathlib.Path, kind: str = "sha256") -> str:
    """Returns the hexadecimal SHA-256 of a file, or another digest of hashlib."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()
