"""`ldmseg completion`: the scripts load in the shells that are here, and complete commands, options and files."""

import shutil
import subprocess

import pytest

from ldmseg_fast.cli import COMMANDS, main
from ldmseg_fast.commands.completion import SHELLS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The script of each shell, as a file."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert main(["completion", shell]) == 0
        (folder / shell).write_text(text.getvalue())
    return folder


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_every_command_and_loads(shell, scripts):
    text = (scripts / shell).read_text()
    assert all(part in text for name in COMMANDS for part in name.split())
    assert "--engine-dir" in text
    if path := shutil.which(shell):
        check = [path, "-n", str(scripts / shell)]  # reads the script and runs nothing
        assert subprocess.run(check, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pr"], ["predict"]),
        (["data", "ch"], ["check"]),
        (["predict", "--eng"], ["--engine-dir"]),
        (["completion", "z"], ["zsh"]),
        (["app", "--hos"], ["--host"]),
        (["push", "--dr"], ["--dry-run"]),
        (["predict", "a_pict"], ["a_picture.png"]),
        (["app", "--model", "a_pict"], ["a_picture.png"]),
        (["pq", "--csv", "a_pict"], ["a_picture.png"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bash_completes(words, expected, scripts, tmp_path):
    (tmp_path / "a_picture.png").touch()
    line = " ".join(f"'{word}'" for word in ["ldmseg", *words])
    code = f"""
source {scripts / "bash"}
COMP_WORDS=({line}); COMP_CWORD={len(words)}
$(complete -p ldmseg | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    bash = ["bash", "--norc", "-c", code]
    assert subprocess.run(bash, cwd=tmp_path, capture_output=True, text=True).stdout.split() == expected


def test_an_unknown_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["completion", "tcl"])
    assert ended.value.code == 2 and "bash" in capsys.readouterr().err
