"""Train a character model on a text with the Python API, then let it write.

python examples/char_rnn.py [TEXT FILE] [--steps N]
"""

import argparse
from pathlib import Path

from fastrnn.generate import generate
from fastrnn.models import LanguageModel
from fastrnn.text import Vocabulary, default_corpus
from fastrnn.train import Settings, Trainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text", nargs="?", type=Path)
parser.add_argument("--steps", type=int, default=500)
options = parser.parse_args()

text = options.text.read_text() if options.text else default_corpus()
vocabulary = Vocabulary.build(text, "char")
model = LanguageModel(len(vocabulary), hidden_size=128, cell="gru", seed=0)


class Report:
    def on_validation(self, trainer: Trainer) -> None:
        print(f"step {trainer.step}: validation loss {trainer.val_loss:.3f} nats per character")


settings = Settings(steps=options.steps, val_every=max(1, options.steps // 5))
trainer = Trainer(model, vocabulary.encode(text), settings, callbacks=[Report()])
trainer.fit()

prompt = vocabulary.encode(text[:20])
print(text[:20] + vocabulary.decode(generate(model, prompt, 300, temperature=0.8, seed=0)[0]))
