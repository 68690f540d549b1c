"""One config and one safe way to load it: recording, class-path check, folders, safetensors, references."""

from lightning_flows.store.building import build, override
from lightning_flows.store.folder import CONFIG, WEIGHTS, json_text, read_config, save_files, save_folder, write_text
from lightning_flows.store.recording import Recorded, config_of
from lightning_flows.store.resolve import PINNED, Pin, is_complete, resolve, zoo_folders
from lightning_flows.store.safety import check, entries, public_path
from lightning_flows.store.weights import in_16_bits, load_into, load_tensors, save_tensors

save = save_folder

__all__ = [
    "CONFIG",
    "PINNED",
    "WEIGHTS",
    "Pin",
    "Recorded",
    "build",
    "check",
    "config_of",
    "entries",
    "in_16_bits",
    "is_complete",
    "json_text",
    "load_into",
    "load_tensors",
    "override",
    "public_path",
    "read_config",
    "resolve",
    "save",
    "save_files",
    "save_folder",
    "save_tensors",
    "write_text",
    "zoo_folders",
]
