"""The corpus: archives made here, so that nothing is fetched."""

import gzip
import hashlib
import io
import json
import pathlib
import re
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from experiments.corpus import __main__ as command
from experiments.corpus import manifest as manifests
from experiments.corpus.documents import MAX_BYTES, documents, is_document
from experiments.corpus.packages import LIST, CorpusError, Package, read_list
from mhc_jax.data import DataConfig, make_iterator
from mhc_jax.data.files import glob_files, split_files

TEXT = "A sentence that stands in no other document, number {}.\n"
SHARED = b"The same licence in both packages.\n"


def wheel(path: pathlib.Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def sdist(path: pathlib.Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def sources(tmp_path):
    """A folder with a wheel and a source distribution, and the list that names them."""
    archives = tmp_path / "archives"
    archives.mkdir()
    documents = {f"one/{i}.py": TEXT.format(i).encode() for i in range(60)}
    dropped = {
        "one/data.bin": b"not a suffix of the list",
        "one/.hidden.py": b"hidden",
        "one/nul.py": b"a\0b",
        "one/latin.py": "caf\xe9".encode("latin-1"),
        "../outside.py": b"escapes",
        "one-1.0.dist-info/licence.txt": b"metadata",
    }
    wheel(
        archives / "One_Package-1.0-py3-none-any.whl",
        documents | dropped | {"one/LICENCE.txt": SHARED},
    )
    sdist(archives / "two-2.0.tar.gz", {"two-2.0/docs/a.rst": b"Two.\n", "two-2.0/L.txt": SHARED})
    packages = tmp_path / "packages.txt"
    packages.write_text("# c\none-package 1.0 wheel .py,.txt\ntwo 2.0 sdist .rst,.txt  # c\n")
    return archives, packages


def run(*arguments) -> None:
    command.main([str(argument) for argument in arguments])


@pytest.fixture
def corpus(sources, tmp_path):
    archives, packages = sources
    run("--output", tmp_path / "corpus", "--packages", packages, "--archives", archives)
    return tmp_path / "corpus"


def test_documents_are_filtered_deduplicated_and_summed(corpus):
    manifest = manifests.read(corpus / "manifest.json")
    expected = {f"one-package/one/{i}.py": TEXT.format(i).encode() for i in range(60)}
    expected |= {"one-package/one/LICENCE.txt": SHARED, "two/two-2.0/docs/a.rst": b"Two.\n"}
    found = {
        p.relative_to(corpus / "text").as_posix(): p
        for p in (corpus / "text").rglob("*.*")
        if p.is_file()
    }
    assert {path: file.read_bytes() for path, file in found.items()} == expected
    lines = sorted(
        (path, hashlib.sha256(content).hexdigest()) for path, content in expected.items()
    )
    text = "".join(f"{digest}  {path}\n" for path, digest in lines)
    assert manifest["checksum"] == hashlib.sha256(text.encode()).hexdigest()
    assert [(p["documents"], p["bytes"]) for p in manifest["packages"]] == [
        (61, sum(map(len, expected.values())) - 5),
        (1, 5),
    ]


def test_totals_are_those_of_the_split_in_training(corpus):
    manifest = manifests.read(corpus / "manifest.json")
    path = manifests.data_path(corpus)
    found = glob_files(path)
    for split, count in (("train", 61), ("validation", 1)):
        chosen = split_files(
            found, validation_fraction=manifest["validation_fraction"], split=split
        )
        assert len(chosen) == count
        assert manifest["totals"][split] == {
            "documents": count,
            "bytes": sum(f.size for f in chosen),
        }
    config = DataConfig(
        source="text",
        path=path,
        tokenizer="byte",
        sequence_length=16,
        validation_fraction=manifest["validation_fraction"],
        shuffle_seed=0,
        synthetic_vocab_size=64,
    )
    assert next(make_iterator(config, split="train", batch_size=2))["inputs"].shape == (2, 16)


def test_rebuild_from_a_manifest_gives_the_same_bytes(corpus, sources, tmp_path, capsys):
    gzipped = tmp_path / "manifest.json.gz"
    manifests.write(gzipped, manifests.read(corpus / "manifest.json"))
    again = tmp_path / "again"
    run("--output", again, "--manifest", gzipped, "--archives", sources[0])
    assert (again / "manifest.json").read_bytes() == (corpus / "manifest.json").read_bytes()
    run("--check", again, "--manifest", gzipped)
    assert manifests.read(gzipped)["checksum"] in capsys.readouterr().out


def test_a_rebuild_takes_what_the_manifest_lists_whatever_the_rules_say(
    corpus, sources, tmp_path, monkeypatch
):
    """So a later change of the rules does not lose an earlier corpus."""
    monkeypatch.setattr("experiments.corpus.documents.is_document", lambda content: False)
    monkeypatch.setattr("experiments.corpus.documents.MAX_BYTES", 1)
    monkeypatch.setattr("experiments.corpus.documents._METADATA_FOLDER", re.compile("/"))
    monkeypatch.setattr("experiments.corpus.manifest.VALIDATION_FRACTION", 0.5)
    again = tmp_path / "again"
    run("--output", again, "--manifest", corpus / "manifest.json", "--archives", sources[0])
    assert (again / "manifest.json").read_bytes() == (corpus / "manifest.json").read_bytes()


def test_a_rebuild_takes_the_listed_content_of_two_members_with_one_path(tmp_path):
    sdist(tmp_path / "two-2.0.tar.gz", {"two/a.rst": b"Listed.\n", "./two/a.rst": b"Another.\n"})
    package = Package("two", "2.0", "sdist", (".rst",))
    archive = package.find(tmp_path)
    for content in (b"Listed.\n", b"Another.\n"):
        listed = {"two/two/a.rst": [hashlib.sha256(content).hexdigest(), len(content)]}
        assert list(documents(package, archive, listed)) == [("two/two/a.rst", content)]


def test_two_lists_may_not_name_one_package(tmp_path):
    (tmp_path / "a").write_text("b 1 wheel .py")
    (tmp_path / "b").write_text("b 2 wheel .py")
    with pytest.raises(CorpusError, match="b is named twice"):
        read_list(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("member", ["../a.py", "b/../../a.py", ".a.py", "b/.c/a.py", "b\\a.py"])
def test_a_manifest_does_not_lead_out_of_the_folder(tmp_path, member):
    """Also a path that is listed has to be one that training finds."""
    wheel(tmp_path / "one-1.0-py3-none-any.whl", {member: b"a = 1\n", "b.py": b"b = 1\n"})
    package = Package("one", "1.0", "wheel", (".py",))
    listed = {f"one/{name}": ["", 0] for name in (member, "b.py")}
    assert list(documents(package, package.find(tmp_path), listed)) == [("one/b.py", b"b = 1\n")]


def test_an_absolute_member_lands_below_its_package(tmp_path):
    sdist(tmp_path / "one-1.0.tar.gz", {"/etc/a.py": b"a = 1\n"})
    package = Package("one", "1.0", "sdist", (".py",))
    assert list(documents(package, package.find(tmp_path))) == [("one/etc/a.py", b"a = 1\n")]


def test_check_names_every_fault(corpus):
    text = corpus / "text" / "one-package" / "one"
    (text / "3.py").write_text("changed")
    (text / "5.py").unlink()
    (text / "new.py").write_text("new")
    with pytest.raises(SystemExit) as error:
        run("--check", corpus)
    assert str(error.value).splitlines()[1:] == [
        "  missing: one-package/one/5.py",
        "  not in the manifest: one-package/one/new.py",
        "  differs: one-package/one/3.py",
    ]


def test_rebuild_names_missing_and_differing_packages(corpus, sources, tmp_path, monkeypatch):
    archives = sources[0]
    wheel(archives / "One_Package-1.0-py3-none-any.whl", {"one/0.py": b"another\n"})
    (archives / "two-2.0.tar.gz").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit) as error:
        run(
            "--output",
            tmp_path / "x",
            "--manifest",
            corpus / "manifest.json",
            "--archives",
            archives,
        )
    message = str(error.value)
    assert "2 of 2 packages" in message
    assert "one-package 1.0: " in message
    assert "the manifest wants One_Package-1.0-py3-none-any.whl" in message
    assert "two 2.0: `" in message
    assert "pip download" in message
    assert "two==2.0" in message
    assert not (tmp_path / "x").exists()


def test_a_rebuild_that_differs_is_not_kept(corpus, sources, tmp_path):
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["files"]["one-package/one/61.py"] = ["0" * 64, 3]
    manifest["checksum"] = manifests.checksum(manifest["files"])
    (tmp_path / "other.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match=r"missing: one-package/one/61.py"):
        run(
            "--output",
            tmp_path / "x",
            "--manifest",
            tmp_path / "other.json",
            "--archives",
            sources[0],
        )
    assert not list((tmp_path / "x").iterdir())


def test_an_edited_manifest_is_refused(corpus):
    path = corpus / "manifest.json"
    path.write_text(path.read_text().replace("one/3.py", "one/4x.py"))
    with pytest.raises(SystemExit, match=r"manifest.json was changed"):
        run("--check", corpus)


def test_archives_are_fetched_once(sources, tmp_path, monkeypatch):
    """pip fetches from a folder of archives as it does from an index; the second time nothing is run."""
    source = tmp_path / "index"
    source.mkdir()
    metadata = b"Metadata-Version: 2.1\nName: one-package\nVersion: 1.0\n"
    wheel(source / "one_package-1.0-py3-none-any.whl", {
        "one/a.py": b"a = 1\n",
        "one_package-1.0.dist-info/METADATA": metadata,
        "one_package-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "one_package-1.0.dist-info/RECORD": b"",
    })  # fmt: skip
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    package = Package("one-package", "1.0", "wheel", (".py",))
    folder = tmp_path / "fetched"
    folder.mkdir()
    archive = package.fetch(folder)
    assert archive == folder / "one_package-1.0-py3-none-any.whl"
    assert list(folder.iterdir()) == [archive]
    shutil.rmtree(source)
    assert package.fetch(folder) == archive


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb to make a Debian package")
def test_documents_of_a_debian_package(tmp_path):
    doc = tmp_path / "tree" / "usr" / "share" / "doc" / "prose"
    doc.mkdir(parents=True)
    (doc / "a.md").write_text("Prose.\n")
    (doc / "b.txt").write_text("Packed prose.\n")
    subprocess.run(["gzip", "-n", doc / "b.txt"], check=True)
    (tmp_path / "tree" / "DEBIAN").mkdir()
    (tmp_path / "tree" / "DEBIAN" / "control").write_text(
        "Package: prose\nVersion: 1:2-3\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    archives = tmp_path / "archives"
    archives.mkdir()
    target = archives / "prose_1%3a2-3_all.deb"
    subprocess.run(
        ["dpkg-deb", "--build", tmp_path / "tree", target], check=True, capture_output=True
    )
    (tmp_path / "list").write_text("prose 1:2-3 deb .md,.txt\n")
    run("--output", tmp_path / "c", "--packages", tmp_path / "list", "--archives", archives)
    files = manifests.read(tmp_path / "c" / "manifest.json")["files"]
    assert sorted(files) == ["prose/usr/share/doc/prose/a.md", "prose/usr/share/doc/prose/b.txt"]
    unpacked = tmp_path / "c" / "text" / "prose" / "usr" / "share" / "doc" / "prose" / "b.txt"
    assert unpacked.read_text() == "Packed prose.\n"


def test_without_apt_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match=r"prose 1\.0: apt-get is not installed"):
        Package("prose", "1.0", "deb", (".md",)).fetch(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" \n",
        b"a\0b",
        b"\xff\xfe",
        b"x" * 2001,
        b"# Generated by a tool. DO NOT EDIT.\nx = 1\n",
        b"123.5, 17.25, 1e-3\n" * 50,
        b"a line\n" * (MAX_BYTES // 7 + 1),
    ],
    ids=["empty", "blank", "nul", "no UTF-8", "minified", "generated", "digits", "large"],
)
def test_what_is_no_document(content):
    assert not is_document(content)
    assert is_document(b"def f(x):\n    return x\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("django 5.2 wheel", "is not `name version kind suffixes`"),
        ("django 5.2 egg .py", "kind 'egg' must be one of wheel, binary, sdist, deb"),
        ("django 5.2 wheel py", "suffix 'py' must look like .py"),
        ("../django 5.2 wheel .py", "'../django' is no name or version"),
        ("b 1 wheel .py\nB 2 sdist .py", "b is named twice"),
        ("# nothing", "names no package"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, line, reason):
    (tmp_path / "list").write_text(line)
    with pytest.raises(CorpusError) as error:
        read_list(tmp_path / "list")
    assert reason in str(error.value)


def test_the_committed_manifest_belongs_to_the_committed_list():
    manifest = manifests.read(LIST.with_name("manifest.json.gz"))
    assert manifests.packages_of(manifest) == read_list(LIST)
    assert sum(size for _, size in manifest["files"].values()) == sum(
        split["bytes"] for split in manifest["totals"].values()
    )
    assert manifest["totals"]["train"]["bytes"] > 115e6


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """A Debian of two packages in folders: an apt-get that serves one version, and its snapshots.

    Yields the corpus of the versions before, and the folder of the snapshots, which is empty.
    """
    served, snapshots, tools = (tmp_path / name for name in ("served", "file", "tools"))
    for folder in (served, snapshots, tools, tmp_path / "archives"):
        folder.mkdir()

    def package(name: str, version: str, texts: dict[str, str]) -> None:
        tree = tmp_path / "tree"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n"
        )
        for path, text in texts.items():
            (tree / path).write_text(text)
        target = served / f"{name}_{version.replace(':', '%3a')}_all.deb"
        subprocess.run(["dpkg-deb", "--build", tree, target], check=True, capture_output=True)
        shutil.rmtree(tree)

    (tools / "apt-get").write_text(
        f"#!/bin/sh\nname=${{2%=*}}; version=${{2#*=}}\n[ $name = $2 ] && version='*'\n"
        f"cp {served}/$name[_]$(echo $version | sed s/:/%3a/)_all.deb . 2> /dev/null ||"
        " { echo \"E: Version for '$2' was not found\" >&2; exit 100; }\n"
    )
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setattr("experiments.corpus.packages.SNAPSHOT", f"file://{tmp_path}")
    package("prose", "1:2-3", {f"{i}.md": f"Prose {i}.\n" for i in range(9)})
    package("verse", "1", {"a.md": "Verse.\n"})
    (tmp_path / "list").write_text("prose 1:2-3 deb .md\nverse 1 deb .md\n")
    run("--output", tmp_path / "before", "--packages", tmp_path / "list")
    shutil.rmtree(served)
    served.mkdir()
    package("prose", "1:2-4", {f"{i}.md": f"Prose {i}.\n" for i in range(8)} | {"7.md": "New.\n"})
    return tmp_path / "before", snapshots


needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")


@needs_dpkg
def test_what_debian_serves_no_more_comes_from_its_snapshots(debian, tmp_path):
    """By the SHA-1 of the manifest: a snapshot is at .../file/SHA-1."""
    before, snapshots = debian
    for archive in (before / "archives").iterdir():
        shutil.copy(archive, snapshots / hashlib.sha1(archive.read_bytes()).hexdigest())
    run("--output", tmp_path / "again", "--manifest", before / "manifest.json")
    again = (tmp_path / "again" / "manifest.json").read_bytes()
    assert again == (before / "manifest.json").read_bytes()


@needs_dpkg
def test_a_snapshot_with_other_content_is_refused(debian, tmp_path):
    before, snapshots = debian
    for archive in (before / "archives").iterdir():
        (snapshots / hashlib.sha1(archive.read_bytes()).hexdigest()).write_text("Try later.")
    with pytest.raises(SystemExit, match=r"the manifest wants verse_1_all\.deb with"):
        run("--output", tmp_path / "again", "--manifest", before / "manifest.json")


@needs_dpkg
def test_packages_that_are_gone_end_with_the_ways_out(debian, tmp_path):
    before, _ = debian
    with pytest.raises(SystemExit) as error:
        run("--output", tmp_path / "again", "--manifest", before / "manifest.json")
    message = str(error.value)
    sha1 = hashlib.sha1((before / "archives" / "verse_1_all.deb").read_bytes()).hexdigest()
    assert "2 of 2 packages" in message
    assert "apt-get download prose=1:2-3` failed: E: Version" in message
    assert f"curl --fail -o {tmp_path}/again/archives/verse_1_all.deb " in message
    assert f"/file/{sha1}`" in message
    assert "apt-get update" in message
    assert "--latest" in message
    with pytest.raises(SystemExit, match=r"/binary/prose/ has earlier versions"):
        run("--output", tmp_path / "again", "--packages", tmp_path / "list")


@needs_dpkg
def test_latest_takes_what_is_there_and_says_how_the_text_differs(debian, tmp_path, capsys):
    before, _ = debian
    run("--output", tmp_path / "new", "--manifest", before / "manifest.json", "--latest")
    said = capsys.readouterr().out
    assert "prose 1:2-4 instead of: prose 1:2-3: " in said
    assert "left out: verse 1: " in said
    assert manifests.read(before / "manifest.json")["checksum"] in said
    assert (
        "7 documents (0.0 MB) are the same, 1 documents (0.0 MB) have another content, "
        "0 documents (0.0 MB) are new, 2 documents (0.0 MB) are gone; 1 of the 1 validation" in said
    )
    manifest = manifests.read(tmp_path / "new" / "manifest.json")
    assert [(p.name, p.version) for p in manifests.packages_of(manifest)] == [("prose", "1:2-4")]
    assert sorted(manifest["files"]) == [f"prose/{i}.md" for i in range(8)]
    # It is a corpus like any other: it can be rebuilt, and with everything there --latest changes nothing.
    again = tmp_path / "again"
    run("--output", again, "--manifest", tmp_path / "new" / "manifest.json", "--latest")
    assert "instead" not in capsys.readouterr().out
    assert (again / "manifest.json").read_bytes() == (
        tmp_path / "new" / "manifest.json"
    ).read_bytes()


def test_latest_leaves_out_no_package_of_pypi(corpus, sources, tmp_path, monkeypatch):
    """They are there everywhere: what fails is the network."""
    (sources[0] / "two-2.0.tar.gz").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    manifest = corpus / "manifest.json"
    with pytest.raises(SystemExit, match=r"two 2.0: `.* two` failed"):
        run(
            "--output",
            tmp_path / "x",
            "--manifest",
            manifest,
            "--archives",
            sources[0],
            "--latest",
        )


def test_the_text_of_the_results_is_told_from_another(corpus, tmp_path):
    assert not manifests.is_corpus_of_results(manifests.data_path(corpus))
    assert not manifests.is_corpus_of_results("texts/**")
    (tmp_path / "manifest.json").write_text(
        gzip.decompress(manifests.OF_RESULTS.read_bytes()).decode()
    )
    assert manifests.is_corpus_of_results(manifests.data_path(tmp_path))
