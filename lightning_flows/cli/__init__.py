"""Floor 5: the command line.

``fit``, ``validate``, ``test`` and ``predict`` go to Lightning's command line with a recipe; the other verbs are small
functions. `main` takes the arguments as a list too, so that tests and notebooks call it in their own process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

TRAINER_VERBS = ("fit", "validate", "test", "predict")

HELP = """usage: lightning-flows VERB [options]

with a recipe (lightning-flows VERB --help):
  fit        train:     lightning-flows fit -c configs/lfm/digits.yaml
             resume:    ... --ckpt_path last (auto: or start)   finetune: ... --init_from org/name
  validate   validation losses of a run or of published weights
  test       distances, bits/dim ... printed and written to metrics.json
  predict    samples:   lightning-flows predict -c RECIPE --ckpt_path last --data.labels='[0,1,2]' --data.seed=7
  encode     latents, once:  lightning-flows encode -c RECIPE --out FOLDER
  statistics of the real images, for test --reference FILE:  lightning-flows statistics -c RECIPE --out FILE

with weights (lightning-flows VERB --help):
  zoo        table of the published models: id, family, data, metric, size, licence
  export     RUN OUT            a run as a folder of weights, config, recipe and card
  push       FOLDER ORG/NAME    weights, config, card, recipe and metrics to the Hugging Face Hub
  convert    FORMAT FILE OUT    an official checkpoint as a folder that from_pretrained reads

  --version  version of the package

Errors are one sentence; LIGHTNING_FLOWS_DEBUG=1 shows where they were raised.
"""


def main(args: Sequence[str] | None = None) -> None:
    """The console script.

    Args:
        args: the arguments after the program's name; those of the process by default.

    Raises:
        SystemExit: with one sentence, where the arguments or files are wrong.
    """
    dispatch(sys.argv[1:] if args is None else args)


def dispatch(args: Sequence[str]) -> object:
    """Run one verb and give back what it made: a trainer verb's `FlowsCLI`, a folder, a table."""
    args = list(args)
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        return _say(HELP)
    if verb == "--version":
        from lightning_flows import __version__

        return _say(f"lightning-flows {__version__}\n")
    try:
        if verb in TRAINER_VERBS:
            from lightning_flows.cli.trainer import run

            return run(args)
        from lightning_flows.cli.verbs import VERBS

        if verb in VERBS:
            return VERBS[verb](args[1:])
    except (ValueError, OSError, ImportError) as error:  # a missing extra says how to install it
        if os.environ.get("LIGHTNING_FLOWS_DEBUG"):
            raise
        raise SystemExit(f"lightning-flows {verb}: {_sentence(error)}") from error
    raise SystemExit(f"lightning-flows: {verb!r} is not a verb\n\n{HELP}")


def _sentence(error: Exception) -> str:
    """What the error says, and its notes.

    The reason alone where jsonargparse wraps it between the types that it tried and the values it was given.
    """
    text = "\n".join([str(error), *getattr(error, "__notes__", [])])
    reasons = [line.strip()[2:] for line in text.splitlines() if line.strip().startswith("- ")]
    reasons = [reason for reason in reasons if not reason.startswith("Expected a")]
    return reasons[0] if "Given value" in text and reasons else text


def _say(text: str) -> str:
    sys.stdout.write(text)
    return text
