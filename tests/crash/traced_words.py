"""An engine of words that is traced: `main` serves one life of it.

Its model answers each prompt with itself, again and again; the word `w007` is the token 7, so that
whoever knows the prompt knows every token of the answer. All the rest is the engine as it is: the
server, the sessions, the thread, the frames.
"""

import asyncio
import sys
import time
from pathlib import Path

import msgspec
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from adapters.store import ArtifactStore
from adapters.text_bundle import TextBundle
from engine.process import serve, set_up_logging
from engine.sequence import StepEvent
from engine.server import EngineServer, bind
from engine.sessions import LinkLimits
from tests.crash.trace import traced
from tests.engine.echo_engine import INFO, EchoCore

VOCAB_SIZE = INFO.vocab_size
# As slow as a model: a kill shall find answers in their middle.
STEP_S = 0.01


class SlowCore(EchoCore):
    def step(self) -> list[StepEvent]:
        if self.running:
            time.sleep(STEP_S)
        return super().step()


def word(token_id: int) -> str:
    return f"w{token_id:03}"


def bundle() -> TextBundle:
    words = {word(token_id): token_id for token_id in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=word(0)))
    tokenizer.pre_tokenizer = Whitespace()
    return TextBundle(
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template="{% for each in messages %}{{ each.content }} {% endfor %}",
        special_tokens={},
        eos_token_ids=(VOCAB_SIZE - 1,),
        generation_defaults={},
        context_length=INFO.max_model_len,
        vocab_size=VOCAB_SIZE,
    )


def main() -> int:
    trace, address, secret, store_url = sys.argv[1:]
    set_up_logging()
    digest = asyncio.run(ArtifactStore(store_url).put_bundle(bundle()))
    info = msgspec.structs.replace(
        INFO, text_bundle_digest=digest, engine_epoch=time.time_ns(), max_loras=64
    )
    with bind(address) as listener:
        engine = EngineServer(
            traced(SlowCore(), Path(trace)),
            info=info,
            listener=listener,
            secret=secret,
            limits=LinkLimits(),
        )
        return 0 if asyncio.run(serve(engine, on_listening=lambda: None)) else 1
