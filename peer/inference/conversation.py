"""One conversation with a model: prompts in, answers streamed to stdout as they are sampled."""

from typing import TYPE_CHECKING

import torch

from hivegrpo.peer.learn.encoding import PromptEncoder, end_token_ids
from hivegrpo.protocol.config import GrpoSection
from hivegrpo.protocol.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Conversation:
    """Remembers what was said where the model has a chat template; without one, each prompt stands alone."""

    def __init__(
        self,
        model: "PreTrainedModel",
        encoder: PromptEncoder,
        grpo: GrpoSection,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        """`temperature` 0 always takes the most probable token; otherwise top_p and top_k are those of the training."""
        from transformers import GenerationConfig

        self._model = model
        self._encoder = encoder
        self._max_new_tokens = max_new_tokens
        self._turns: list[dict[str, str]] = []
        # It replaces the base's own: a repetition penalty in there would give other answers than the run trained for.
        ends = sorted(end_token_ids(encoder.tokenizer, model.generation_config))
        sampling = {"do_sample": True, "temperature": temperature, "top_p": grpo.top_p, "top_k": grpo.top_k}
        model.generation_config = GenerationConfig(
            eos_token_id=ends or None,
            pad_token_id=0,  # of no effect: one answer at a time needs no padding
            **(sampling if temperature > 0.0 else {"do_sample": False}),
        )

    @torch.inference_mode()
    def answer(self, prompt: str) -> str:
        """Stream the answer to stdout, and return it. ConfigError for a prompt that is empty, or too long.

        An answer that is interrupted is forgotten, with its prompt.
        """
        from transformers import TextStreamer

        ids = self._encode(prompt)
        tokens = torch.tensor([ids], device=self._model.device)
        output = self._model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=min(self._max_new_tokens, self._context - len(ids)),
            streamer=TextStreamer(self._encoder.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        [text] = self._encoder.decode([output[0, len(ids) :].tolist()])
        self._turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        return text

    @property
    def _context(self) -> int:
        """Tokens that the model can look back at, its own included."""
        return int(getattr(self._model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def _encode(self, prompt: str) -> list[int]:
        """The prompt, after as much of what was said before as leaves room for an answer."""
        earlier = self._turns if self._encoder.chat else []
        ids = self._after(earlier, prompt)
        while earlier and len(ids) + self._max_new_tokens > self._context:
            earlier = earlier[2:]
            ids = self._after(earlier, prompt)
        if not 0 < len(ids) < self._context:
            raise ConfigError(f"The prompt has {len(ids)} tokens; the model takes 1 to {self._context - 1}.")
        return ids

    def _after(self, earlier: list[dict[str, str]], prompt: str) -> list[int]:
        if not earlier:
            return self._encoder.encode(prompt)
        system = self._encoder.system_prompt
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages += [*earlier, {"role": "user", "content": prompt}]
        tokenizer = self._encoder.tokenizer
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
