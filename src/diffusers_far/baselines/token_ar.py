"""The token-autoregressive baseline: a video as one sequence of tokens, and a decoder of transformers that continues it.

A frame is an opening token, the action that led to the frame or the null token, and after it the codes of a VQ
autoencoder, row by row. Opening tokens are given, never predicted. Codes are sampled from logits by random numbers that
are drawn beforehand.

B batch, F frames, T codes per frame, N size of the codebook.
"""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..checks import check_count, check_memory
from ..models.frames import check_condition, shift_actions
from ..models.loading import describe_key_errors, explained_loading_errors, require_safetensors


@dataclass(frozen=True)
class CodeSampling:
    """Chooses a code for each video.

    Args:
        temperature (`float`): At least 0; 0 takes the likeliest code.
        top_k (`int`, *optional*): Draw only from the k likeliest codes.
        top_p (`float`, *optional*): Above 0, at most 1: draw only from the likeliest codes that together have
            probability p.

    Raises:
        ValueError: A value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"`temperature` is {self.temperature}; give 0 for the likeliest code, or a number above 0."
            )
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"`top_k` is {self.top_k!r}; it counts codes, so give a whole number from 1, or None.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; it is a probability above 0 and at most 1, or None.")

    def __call__(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Choose.

        Args:
            logits (`torch.Tensor` of shape `(B, N)`): Of the next code.
            uniform (`torch.Tensor` of shape `(B,)`): Random numbers in [0, 1).

        Returns:
            `torch.Tensor` of shape `(B,)`, int64.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        scores = logits.double() / self.temperature
        if self.top_k is not None:
            scores = TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p is not None:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        # The inverse of the distribution function, in float64: a float32 draw times the total stays below the total, so
        # a code that was ruled out, whose step has no height, is never hit.
        cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
        threshold = uniform.double()[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def draw_uniform(
    batch_size: int, num_draws: int, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> torch.Tensor:
    """Random numbers in [0, 1), of each video from its own generator where there is a list of them.

    Args:
        batch_size (`int`): B.
        num_draws (`int`): Numbers for each video.
        generator (`torch.Generator` or a list of B, *optional*): On any device, where the numbers then lie; on the CPU
            they are the same whatever device computes the rest.

    Returns:
        `torch.Tensor` of shape `(B, num_draws)`, float32.

    Raises:
        ValueError: There are more or fewer generators than videos.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = None if generator is None else generator.device
        return torch.rand(batch_size, num_draws, generator=generator, device=device)
    if len(generator) != batch_size:
        raise ValueError(
            f"`generator` has {len(generator)} for a batch of {batch_size} videos; give one for each, or a single one."
        )
    return torch.stack([torch.rand(num_draws, generator=each, device=each.device) for each in generator])


COUNTS = {"num_codes": 2**24, "tokens_per_frame": 2**20, "num_actions": 2**24, "trained_frames": 2**31}


class TokenARConfig(PretrainedConfig):
    """Config of [`TokenARForVideo`].

    One vocabulary holds the image codes from 0 on, after them the actions, and the null token last.

    Args:
        num_codes (`int`): N, entries of the VQ autoencoder's codebook.
        tokens_per_frame (`int`): T, such as 64 for 8 by 8 codes.
        num_actions (`int`, *optional*): Discrete actions; `None`: every frame opens with the null token.
        trained_frames (`int`, *optional*): Longest clip seen in training; written by the training script.
        decoder (`PretrainedConfig` or `dict`, *optional*): A causal decoder of transformers, Llama where a dict names no
            `model_type`. Its vocabulary and special tokens are set here.

    Raises:
        ValueError: A count is below 1 or absurdly large, or a number of the decoder is not finite.
    """

    model_type = "token_ar_video"
    sub_configs_defaults = {"decoder": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    num_codes: int = 1024
    tokens_per_frame: int = 64
    num_actions: int | None = None
    trained_frames: int | None = None
    decoder: dict | PretrainedConfig | None = None

    def __post_init__(self, **kwargs):
        for name, most in COUNTS.items():
            check_count(name, getattr(self, name), most=most, optional=name in ("num_actions", "trained_frames"))
        if self.decoder is not None:
            if not isinstance(self.decoder, (Mapping, PretrainedConfig)):
                raise ValueError(
                    f"`decoder` is {self.decoder!r}; give a config of transformers, or a dict of its fields."
                )
            check_decoder(self.decoder if isinstance(self.decoder, Mapping) else self.decoder.to_dict())
        self.decoder = copy.deepcopy(self.decoder)
        super().__post_init__(**kwargs)
        self.decoder.vocab_size = self.vocab_size
        # Numbers of a text vocabulary would here be codes; a padding token's embedding would not even be learned.
        self.decoder.bos_token_id = self.decoder.eos_token_id = self.decoder.pad_token_id = None

    @property
    def null_token(self) -> int:
        return self.num_codes + (self.num_actions or 0)

    @property
    def vocab_size(self) -> int:
        return self.null_token + 1


class TokenARForVideo(PreTrainedModel):
    """Predicts the codes of a video one after another, each from the codes and actions before it.

    Args:
        config ([`TokenARConfig`]): Sizes, and the decoder.

    Source: the baseline of FAR, arXiv:2503.19325.
    """

    config_class = TokenARConfig
    base_model_prefix = "decoder"
    main_input_name = "codes"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: TokenARConfig) -> None:
        super().__init__(config)
        sizes = config.decoder.to_dict()
        width = sizes.get("hidden_size") or sizes.get("n_embd") or 0
        num_layers = sizes.get("num_hidden_layers") or sizes.get("n_layer") or 0
        num_weights = (num_layers * 8 * width + 2 * config.vocab_size) * width
        check_memory(num_weights, ("hidden_size", "num_hidden_layers", "vocab_size"), sizes)
        self.decoder = AutoModel.from_config(config.decoder)
        # Only codes are ever predicted, so the head has no other rows.
        self.code_head = nn.Linear(config.decoder.hidden_size, config.num_codes, bias=False)
        self.post_init()

    @classmethod
    @wraps(PreTrainedModel.from_pretrained.__func__, assigned=())
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args, output_loading_info: bool = False, **kwargs
    ):
        """As `PreTrainedModel.from_pretrained`, from safetensors only; incomplete weights are an error.

        Raises:
            ValueError: The weights lack keys of the model or have others, or `use_safetensors` is `False`.
            OSError: A file is missing, truncated or not what it should be.
        """
        require_safetensors("use_safetensors", kwargs.get("use_safetensors"))
        kwargs["use_safetensors"] = True
        with explained_loading_errors(pretrained_model_name_or_path):
            model, loading_info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        errors = describe_key_errors(loading_info["missing_keys"], loading_info["unexpected_keys"])
        if errors:
            raise ValueError(
                f"The weights in {str(pretrained_model_name_or_path)!r} do not fit the config beside them: {errors}. "
                "Fetch the folder again, or correct its config.json."
            )
        return (model, loading_info) if output_loading_info else model

    def forward(
        self,
        codes: torch.Tensor,
        actions: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Predict every code of whole frames from what comes before it.

        Args:
            codes (`torch.Tensor` of shape `(B, F, T)`): Integers in `[0, num_codes)`, row by row.
            actions (`torch.Tensor` of shape `(B, F)`, *optional*): The action that led to each frame, in
                `[0, num_actions)`; needed where the model has actions. [`~models.frames.shift_actions`] makes it of
                the actions taken at each frame.
            action_mask (`torch.Tensor` of shape `(B, F)`, bool, *optional*): `False`: the frame opens with the null
                token. The first frame of a video is opened so.
            labels (`torch.Tensor` of shape `(B, F, T)`, *optional*): Usually `codes` again; -100 counts for nothing.
            past_key_values (`Cache`, *optional*): Of the frames before, whole ones.
            use_cache (`bool`): Return the cache.
            kwargs: Of the decoder.

        Returns:
            `CausalLMOutputWithPast`: `logits` (B, F, T, N) of each code; `loss`, their mean cross entropy in nats, where
            there are labels; `past_key_values`.

        Raises:
            ValueError: An argument has the wrong shape, type or values.
        """
        self._check_codes(codes)
        openings = self._opening_tokens(codes.shape[:2], actions, action_mask).to(codes.device)
        tokens = torch.cat([openings[..., None], codes], dim=2)  # (B, F, 1 + T)
        outputs = self.decoder(
            input_ids=tokens.flatten(1), past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )
        hidden_states = outputs.last_hidden_state.unflatten(1, tokens.shape[1:])
        # Each place predicts the next token: the opening token the first code, and the last code nothing of its frame.
        logits = self.code_head(hidden_states[:, :, :-1])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 2).float(), labels.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    @torch.no_grad()
    def generate_frames(
        self,
        codes: torch.Tensor,
        actions: torch.Tensor | None = None,
        num_frames: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        use_cache: bool = True,
    ) -> torch.Tensor:
        """Continue videos, code by code.

        Args:
            codes (`torch.Tensor` of shape `(B, F, T)`): The context; F may be 0.
            actions (`torch.Tensor` of shape `(B, F + num_frames)`, *optional*): The action taken at each frame, which
                leads to the next one. The last leads out of the video and may be left out.
            num_frames (`int`): Frames to generate, at least 1.
            temperature (`float`): At least 0; 0 takes the likeliest code.
            top_k (`int`, *optional*), top_p (`float`, *optional*): Draw only from the k likeliest codes, or the
                likeliest ones that together have probability p.
            generator (`torch.Generator` or a list of B, *optional*): With one for each video, a video does not depend
                on the others in its batch.
            use_cache (`bool`): `False` computes everything anew for each code: the same result, slowly.

        Returns:
            `torch.Tensor` of shape `(B, num_frames, T)`, int64: the new frames.

        Raises:
            ValueError: An argument has the wrong shape, type or values.
        """
        # 1. Check the inputs
        sampling = CodeSampling(temperature, top_k, top_p)
        self._check_codes(codes)
        if not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(
                f"`num_frames` is {num_frames!r}; it counts the new frames, so give a whole number from 1."
            )
        batch_size, num_context_frames, codes_per_frame = codes.shape
        shape, mask = (batch_size, num_context_frames + num_frames), None
        if self.config.num_actions is not None and actions is not None:
            actions, mask = shift_actions(actions, action_shift=1, num_frames=shape[1])
        openings = self._opening_tokens(shape, actions, mask).to(codes.device)

        # 2. Feed the context together with the first code's opening token, then what is new
        context = torch.cat([openings[:, :num_context_frames, None], codes], dim=2).flatten(1)
        cache = DynamicCache(config=self.config.decoder) if use_cache else None
        tokens, num_fed = context, 0
        for frame in range(num_context_frames, shape[1]):
            tokens = torch.cat([tokens, openings[:, frame : frame + 1]], dim=1)
            uniform = draw_uniform(batch_size, codes_per_frame, generator).to(codes.device)
            for place in range(codes_per_frame):
                hidden_states = self.decoder(
                    input_ids=tokens[:, num_fed:], past_key_values=cache, use_cache=use_cache
                ).last_hidden_state
                num_fed = tokens.shape[1] if use_cache else 0
                code = sampling(self.code_head(hidden_states[:, -1]), uniform[:, place])
                tokens = torch.cat([tokens, code[:, None]], dim=1)

        # 3. The new frames, without their opening tokens
        return tokens[:, context.shape[1] :].unflatten(1, (num_frames, -1))[:, :, 1:]

    def _opening_tokens(
        self, shape: Sequence[int], actions: torch.Tensor | None, action_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The token that each frame opens with, `(B, F)`."""
        num_actions = self.config.num_actions
        check_condition("actions", actions, num_actions is not None, tuple(shape))
        if num_actions is None:
            return torch.full(tuple(shape), self.config.null_token)
        _check_range("actions", actions, "num_actions", num_actions)
        openings = actions + self.config.num_codes
        if action_mask is None:
            return openings
        if action_mask.shape != openings.shape or action_mask.dtype != torch.bool:
            raise ValueError(
                f"`action_mask` has shape {tuple(action_mask.shape)} and type {action_mask.dtype}; it says of each frame "
                f"whether its action counts, so give {tuple(shape)} of torch.bool."
            )
        return openings.masked_fill(~action_mask, self.config.null_token)

    def _check_codes(self, codes: torch.Tensor) -> None:
        if codes.ndim != 3 or codes.shape[2] != self.config.tokens_per_frame:
            raise ValueError(
                f"`codes` has shape {tuple(codes.shape)}; give (batch, frames, {self.config.tokens_per_frame}), the codes "
                "of each frame row by row, as `encode_codes(vq, video).flatten(1)` gives them for one video."
            )
        _check_range("codes", codes, "num_codes", self.config.num_codes)


def _check_range(name: str, values: torch.Tensor, limit_name: str, limit: int) -> None:
    """Refuse what would silently be read as another kind of token."""
    if values.dtype != torch.int64:
        raise ValueError(f"`{name}` has type {values.dtype}; they are indices, so give torch.int64.")
    if torch.compiler.is_compiling() or values.numel() == 0:
        return
    lowest, highest = (bound.item() for bound in values.aminmax())
    if lowest < 0 or highest >= limit:
        raise ValueError(
            f"`{name}` has values from {lowest} to {highest}, but `{limit_name}` is {limit}: they must be in "
            f"[0, {limit}). Give those of the data that the model was made for."
        )


# So that transformers' Auto classes load what was saved, as soon as one of these classes is imported.
AutoConfig.register(TokenARConfig.model_type, TokenARConfig)
AutoModel.register(TokenARConfig, TokenARForVideo)


# Fields of transformers' decoders that count.
DECODER_COUNTS = {
    "hidden_size": 2**16,
    "n_embd": 2**16,
    "intermediate_size": 2**18,
    "n_inner": 2**18,
    "num_hidden_layers": 2**10,
    "n_layer": 2**10,
    "num_attention_heads": 2**10,
    "n_head": 2**10,
    "num_key_value_heads": 2**10,
    "head_dim": 2**12,
    "max_position_embeddings": 2**31,
    "n_positions": 2**31,
}


def check_decoder(decoder: Mapping) -> None:
    """Refuse impossible sizes of a decoder of transformers, and numbers that are not finite; the values named."""
    for name, value in decoder.items():
        if name in DECODER_COUNTS:
            check_count(f"decoder.{name}", value, most=DECODER_COUNTS[name], optional=True)
        for inner_name, number in value.items() if isinstance(value, Mapping) else ((name, value),):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"`decoder.{inner_name}` is {number}; give a finite number.")
