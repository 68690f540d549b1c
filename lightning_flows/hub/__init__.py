"""Floor 4: cards, publishing, the table of the zoo. The Hub's client is imported only where it is used."""

from lightning_flows.hub.adapters import adapter_card, write_adapter_card
from lightning_flows.hub.cards import Figure, card, figures, read_header, write_card
from lightning_flows.hub.push import check_folder, push, push_to_hub, save_pretrained
from lightning_flows.hub.zoo import Entry, entries, table

__all__ = [
    "Entry",
    "Figure",
    "adapter_card",
    "card",
    "check_folder",
    "entries",
    "figures",
    "push",
    "push_to_hub",
    "read_header",
    "save_pretrained",
    "table",
    "write_adapter_card",
    "write_card",
]
