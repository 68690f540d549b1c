"""``python -m lightning_flows`` is ``lightning-flows``."""

from lightning_flows.cli import main

if __name__ == "__main__":
    main()
