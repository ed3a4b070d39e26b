"""A small byte-level language model whose feed-forward layers are Mixture-of-Experts layers of edl."""

import json
import pathlib
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import edl
from edl.diagnostics.files import write_whole

INITIAL_STD = 0.1
WEIGHTS, SETTINGS = "model.safetensors", "settings.json"


class ModelSettings(NamedTuple):
    """Sizes of the model; the defaults train in seconds on two cores."""

    vocabulary: int = 256
    sequence_length: int = 256
    layers: int = 2
    hidden_size: int = 96
    heads: int = 4
    intermediate_size: int = 96
    experts: int = 8
    top_k: int = 2

    @property
    def max_position_embeddings(self):
        """The name under which `edl observe` looks for how much a model reads."""
        return self.sequence_length


class RecentBytes(nn.Module):
    """Mixes each byte's embedding with those of the bytes just before it, with one weight per channel and distance.

    A letter alone says little. Without this the short training is spent on learning to look one byte back.
    """

    def __init__(self, hidden_size, width=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, hidden_size) * 0.3)
        with torch.no_grad():
            self.weight[0].fill_(1.0)

    def forward(self, hidden):
        """hidden: [B, S, H] -> [B, S, H]."""
        length = hidden.shape[1]
        padded = F.pad(hidden, (0, 0, len(self.weight) - 1, 0))
        shifted = (padded[:, len(self.weight) - 1 - back :][:, :length] for back in range(len(self.weight)))
        return sum(weight * earlier for weight, earlier in zip(self.weight, shifted))


class Attention(nn.Module):
    """Causal self-attention with several heads and rotary positions."""

    def __init__(self, settings):
        super().__init__()
        self.heads = settings.heads
        self.query_key_value = nn.Linear(settings.hidden_size, 3 * settings.hidden_size, bias=False)
        self.output = nn.Linear(settings.hidden_size, settings.hidden_size, bias=False)
        turns = _turns(settings.sequence_length, settings.hidden_size // settings.heads)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, hidden):
        """hidden: [B, S, H] -> [B, S, H]."""
        query, key, value = self.query_key_value(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = _rotate(query, self.turns), _rotate(key, self.turns)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


def _turns(length, channels):
    """Returns the cosines and sines of rotary positions, [2, length, channels / 2]."""
    angles = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, channels, 2) / channels)
    return torch.stack((angles.cos(), angles.sin()))


def _rotate(hidden, turns):
    """Turns each pair of channels by an angle that grows with the position; hidden: [..., S, channels]."""
    cosine, sine = turns[:, : hidden.shape[-2]]
    first, second = hidden.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


class Block(nn.Module):
    """Attention, then a Mixture of Experts, each on normalised input and added to the residual stream."""

    def __init__(self, settings):
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.hidden_size)
        self.attention = Attention(settings)
        self.experts_norm = nn.RMSNorm(settings.hidden_size)
        self.experts = edl.MoELayer(settings.hidden_size, settings.intermediate_size, settings.experts, settings.top_k)

    def forward(self, hidden):
        """hidden: [B, S, H] -> ([B, S, H], Routing of the B·S tokens)."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        update, routing = self.experts(self.experts_norm(hidden))
        return hidden + update, routing


class LanguageModel(nn.Module):
    """Predicts the next byte."""

    def __init__(self, settings):
        super().__init__()
        self.config = settings
        self.bytes = nn.Embedding(settings.vocabulary, settings.hidden_size)
        self.recent_bytes = RecentBytes(settings.hidden_size)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.hidden_size)
        self.head = nn.Linear(settings.hidden_size, settings.vocabulary, bias=False)
        self.apply(_initialise)

    def forward(self, inputs):
        """Runs the model.

        Arguments:
            inputs: [B, S] int64, bytes.

        Returns:
            (logits [B, S, 256], list of one Routing per layer, each over B·S tokens in the order b·S + s).
        """
        hidden = self.recent_bytes(self.bytes(inputs))
        routings = []
        for block in self.blocks:
            hidden, routing = block(hidden)
            routings.append(routing)
        return self.head(self.norm(hidden)), routings


def _initialise(module):
    """Normal weights in every matrix, the MoE layers' included, so that the start does not depend on their defaults.

    The embedding keeps torch's standard deviation of 1: with that of the matrices the same training ended a third of a
    bit per byte worse.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INITIAL_STD)
    elif isinstance(module, edl.MoELayer):
        for weight in (module.router.weight, module.gate_up_proj, module.down_proj):
            nn.init.normal_(weight, std=INITIAL_STD)


def save(model, folder):
    """Writes weights and settings into a folder, which it makes; each file is whole or as before."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SETTINGS, f"{json.dumps(model.config._asdict(), indent=1)}\n".encode())
    write_whole(folder / WEIGHTS, safetensors.torch.save(model.state_dict()))


def load(path):
    """Reads what `save` has written, as `edl observe MODEL --loader examples/pretrain/model.py:load` asks for it.

    Arguments:
        path: of the folder.

    Returns:
        (LanguageModel, None): its tokens are bytes.
    """
    folder = pathlib.Path(path)
    model = LanguageModel(ModelSettings(**json.loads((folder / SETTINGS).read_text())))
    model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return model, None
