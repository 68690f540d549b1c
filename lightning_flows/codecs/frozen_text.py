"""The text encoders of published models, frozen, through transformers: T5, CLIP, others with a last hidden state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_flows.codecs.frozen import _reference
from lightning_flows.codecs.prompts import PromptTemplate
from lightning_flows.codecs.text import TextEncoder, padded
from lightning_flows.flow.condition import Tokens

_NULLS = 16  # null prompts that are kept: a template with other facts (aspect ratios) has another one


class FrozenText(TextEncoder):
    """A frozen text model of transformers: its last hidden state, zero where the text is padded.

    Of a model with encoder and decoder (T5) the encoder alone is loaded, of one with text and images (CLIP) the
    text half. The network and its tokenizer are loaded when they are first used, from safetensors and without code
    of the repository. The network follows the device that is asked for, stays in eval mode and in float32 (also
    under autocast), and is never a submodule of whatever holds the encoder. Copies of the encoder share it; a pickle
    leaves it out. The null prompt is encoded once.

    Args:
        repo: ``org/name``, ``org/name@revision``, or a local folder.
        length: number L of tokens: texts are padded or cut to it. STARFlow has 128 for images, 256 for video.
        subfolder: folder of the text model in a repository that holds more.
        revision: commit, branch or tag, where ``repo`` does not say it.
        tokenizer: of the tokenizer where it is not beside the model: as ``repo``.
        tokenizer_subfolder: its folder in the repository; that of the model where neither this nor ``tokenizer`` is
            given.
        template: of the prompts; None takes the captions as they are.

    Raises:
        ValueError: no token, a revision given twice.
    """

    frozen = True

    def __init__(
        self,
        repo: str,
        *,
        length: int = 128,
        subfolder: str | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        tokenizer_subfolder: str | None = None,
        template: PromptTemplate | None = None,
    ) -> None:
        super().__init__(length, template)
        self.repo, self.revision = _reference(repo, revision)
        self.subfolder, self.tokenizer_subfolder = subfolder, tokenizer_subfolder
        self.tokenizer_repo = tokenizer
        self._network: nn.Module | None = None  # once it is used, as the following
        self._tokenizer: Any = None
        self._settings: Any = None
        self._nulls: dict[str, Tokens] = {}

    # ---- the encoder

    @property
    def size(self) -> int:
        """See `TextEncoder.size`; reads the config, not the weights."""
        return int(self.settings.hidden_size)

    def embed(self, prompts: Sequence[str], device: torch.device | str | None = None) -> Tokens:
        """See `TextEncoder.embed`.

        Raises:
            ValueError: a model or a tokenizer that cannot be loaded, or a ``length`` that is too much for the model.
        """
        with torch.inference_mode(False), torch.no_grad():  # else tokens of a validation could not be trained on
            network = self.network(device)
            here = next(network.parameters()).device
            ids, mask = (part.to(here) for part in self.tokenize(prompts))  # each (B, L)
            with torch.autocast(here.type, enabled=False):
                return padded(network(input_ids=ids, attention_mask=mask).last_hidden_state, mask)  # (B, L, D)

    def embed_null(self, prompt: str, device: torch.device | str | None = None) -> Tokens:
        """See `TextEncoder.embed_null`; each null prompt is encoded once."""
        if prompt not in self._nulls:
            if len(self._nulls) >= _NULLS:
                self._nulls.clear()
            self._nulls[prompt] = self.embed([prompt], device)
        kept = self._nulls[prompt]
        return kept if device is None else Tokens(*(part.to(device) for part in kept))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask of texts, int64, each (B, L), on the CPU."""
        found = self.tokenizer(
            list(prompts),
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return found["input_ids"], found["attention_mask"]

    # ---- the frozen parts

    @property
    def settings(self) -> Any:
        """The text model's own config."""
        if self._settings is None:
            self._settings = self._text_settings(self._read_config())
        return self._settings

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def network(self, device: torch.device | str | None = None) -> Any:
        """The frozen text model, on ``device`` or where it is."""
        if self._network is None:
            self._network = self.load().eval().requires_grad_(False)
        if device is not None and next(self._network.parameters()).device != torch.device(device):
            self._network.to(device)
        return self._network

    def load(self) -> nn.Module:
        """The text model with its weights, float32, on the CPU.

        Raises:
            ValueError: it is nowhere to be found or cannot be fetched, its file lacks weights, ``length`` is too much.
        """
        self._check_length()
        with self._named("text model"):
            config = self._read_config()
            options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
            network, info = _class_for(config).from_pretrained(
                self.repo, output_loading_info=True, **options, **self._where()
            )
            # A pooled output is not read; other weights that a file lacks would be random numbers.
            if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
                raise OSError(f"its file lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}")
        split = config.is_encoder_decoder and hasattr(network, "decoder")
        return network.get_encoder() if split else network

    def _read_config(self) -> Any:
        import transformers  # here: heavy, and needed by few

        with self._named("text model"):
            return transformers.AutoConfig.from_pretrained(self.repo, trust_remote_code=False, **self._where())

    @staticmethod
    def _text_settings(config: Any) -> Any:
        return config.get_text_config(encoder=True) if config.is_encoder_decoder else config.get_text_config()

    def _check_length(self) -> None:
        most = getattr(self.settings, "max_position_embeddings", None)
        if most is not None and self.length > most:
            raise ValueError(f"length must be at most {most}, the positions of {self.repo}, got {self.length}")

    def _load_tokenizer(self) -> Any:
        import transformers

        repo, where = self.repo, self._where()
        if self.tokenizer_repo is not None:
            repo, revision = _reference(self.tokenizer_repo, None)
            where = {} if revision is None else {"revision": revision}
        if self.tokenizer_subfolder is not None:
            where = {**where, "subfolder": self.tokenizer_subfolder}
        with self._named("tokenizer"):
            found = transformers.AutoTokenizer.from_pretrained(repo, trust_remote_code=False, **where)
        if found.pad_token is None:
            found.pad_token = found.eos_token  # never read: the mask hides it
        return found

    @contextmanager
    def _named(self, part: str) -> Iterator[None]:
        """Says what could not be read, and what else would do."""
        try:
            yield
        except (OSError, ValueError, KeyError, ImportError) as error:  # by what is wrong: place, kind, library
            reason = str(error).strip().split("\n")[0]
            argument = "tokenizer" if part == "tokenizer" and self.tokenizer_repo is not None else "repo"
            named = self.tokenizer_repo if argument == "tokenizer" else self.repo
            raise ValueError(
                f"the {part} {named!r} of the text encoder cannot be loaded ({reason}). Give a folder with it: "
                f"{argument}=FOLDER, on the command line --model.init_args.text.init_args.{argument} FOLDER"
            ) from error

    def _where(self) -> dict[str, Any]:
        given = {"subfolder": self.subfolder, "revision": self.revision}
        return {name: value for name, value in given.items() if value is not None}

    def __getstate__(self) -> dict[str, Any]:
        """State without what was loaded: a pickle names weights, it does not carry them."""
        loaded = {"_network": None, "_tokenizer": None, "_settings": None, "_nulls": {}}
        return {**self.__dict__, **loaded}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """An encoder that shares the frozen network."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        memo[id(self)] = copy
        return copy


def _class_for(config: Any) -> Any:
    """What loads the text half of a kind of model."""
    import transformers

    if config.model_type == "clip":
        return transformers.CLIPTextModel
    text_models = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if type(config) in text_models else transformers.AutoModel
