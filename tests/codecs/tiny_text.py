"""Text models of a few hundred numbers with random weights, as folders that transformers reads."""

import torch

WORDS = "<pad> </s> <unk> a cat dog on the mat red blue one two noise level an image 300 : , ."
VOCABULARY = {word: i for i, word in enumerate(WORDS.split())}
SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
CLIP_TEXT = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 12, "eos_token_id": 1, "pad_token_id": 0}


def write_tokenizer(folder, **special):
    """Words and punctuation, each text ended by ``</s>``."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


def write_t5(folder, *, whole=False, seed=0):
    """T5 with its decoder, or its encoder alone."""
    from transformers import T5Config, T5EncoderModel, T5Model

    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return _write(T5Model if whole else T5EncoderModel, T5Config(**sizes), folder, seed)


def write_clip(folder, *, whole=False, seed=0):
    """CLIP with its image half, or its text half alone."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

    if not whole:
        return _write(CLIPTextModel, CLIPTextConfig(**CLIP_TEXT), folder, seed)
    image = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    image |= {"image_size": 8, "patch_size": 4}
    return _write(CLIPModel, CLIPConfig(text_config=CLIP_TEXT, vision_config=image), folder, seed)


def write_bert(folder, seed=0):
    """An encoder that is neither."""
    from transformers import BertConfig, BertModel

    return _write(BertModel, BertConfig(**SIZES, num_hidden_layers=1, max_position_embeddings=16), folder, seed)


def write_gpt2(folder, seed=0):
    """A decoder; its tokenizer has nothing to pad with."""
    from transformers import GPT2Config, GPT2Model

    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    return _write(GPT2Model, config, folder, seed, pad_token=None)


def write_bart(folder, seed=0):
    """Encoder and decoder in one class."""
    from transformers import BartConfig, BartModel

    heads = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 16))}
    heads |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=32, d_model=8, max_position_embeddings=16, **heads)
    return _write(BartModel, config, folder, seed)


def _write(kind, config, folder, seed, **special):
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    network = kind(config)
    for parameter in network.parameters():  # such as are told apart: the usual ones are nearly zero
        torch.nn.init.normal_(parameter, std=0.5)
    torch.set_rng_state(state)
    network.save_pretrained(folder)
    return write_tokenizer(folder, **special)
