import subprocess
import sys

import pytest

import lightning_flows
from lightning_flows.cli import main


def test_help_lists_all_verbs(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    for verb in ("fit", "validate", "test", "predict", "zoo", "export", "push", "convert"):
        assert f"\n  {verb} " in text


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-flows {lightning_flows.__version__}\n"


def test_an_unknown_verb_is_refused():
    with pytest.raises(SystemExit, match="'paint' is not a verb"):
        main(["paint"])


def test_push_of_a_folder_without_weights_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"config\.json"):
        main(["push", str(tmp_path), "org/name"])


def test_small_verbs_do_not_wait_for_lightning():
    code = (
        "import sys; from lightning_flows.cli import main; main(['zoo']); "
        "assert 'lightning' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_was_noted_on_an_error_is_said_as_well(monkeypatch):
    def fails(args):
        error = ConnectionResetError(104, "Connection reset by peer")
        error.add_note("A data worker was ended from outside")
        raise error

    monkeypatch.setattr("lightning_flows.cli.trainer.run", fails)
    with pytest.raises(SystemExit, match=r"(?s)lightning-flows fit: .*reset by peer\nA data worker was ended"):
        main(["fit"])
