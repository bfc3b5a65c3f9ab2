"""Why RL preserves what was known (arXiv 2506.23508): it is the data, not the algorithm.

Its sentence: SFT on answers that RL collected forgets less than SFT on labels or foreign traces;
the likelier the traces are to the base, the less it forgets.

Here: SFT from one base on labels alone, on the world's short and verbose traces, on the base's own
right answers, and on those of its GRPO model; forgotten is what was known in words (`text`, never
trained on), and captions, a task of the base: the log-prob per token of true ones. All take 96
steps, though wrong answers are left out. How likely traces are is of the first batch.
"""
import data
from evaluate import Finding, spearman
from tests.papers import mean_logprob, run_paper

WAYS = {"labels": "{}/sft --traces answer", "short": "{}/sft", "verbose": "{}/sft --traces verbose",
        "its own": "{0}/sft --traces @{0} --steps 96",
        "its GRPO's": "{0}/sft --traces @{0}+grpo --steps 96"}


def likely(a, base, figure):
    """Spearman's rho, times 100, of how likely the traces were to the base and a figure after."""
    cells = [cell.format(base) for cell in WAYS.values()]
    return 100 * spearman([a(cell, "trace_logprob") for cell in cells],
                          [a(cell, figure) for cell in cells])


def captions(directory, count=100):
    """Log-prob per token of true captions of new pictures: what the base was trained to say."""
    new = map(data.base_example, range(10_000_000, 10_000_000 + 10 * count))
    asked = [one for one in new if one.question == f"{data.IMAGE}Describe the table."]
    return mean_logprob(directory, asked[:count])


FINDING = Finding(
    "Does imitation forget less, the likelier its traces were?", "base", ("middle", "strong"),
    ("text", "ood"), {"base": "{}", **WAYS},
    {"the likelier, the better in words (strong base, 100 ρ)":
         lambda a: likely(a, "strong", "text"),
     "the likelier, the better captions (strong base, 100 ρ)":
         lambda a: likely(a, "strong", "captions"),
     "answers of its GRPO model forget less than labels (strong base, in words)":
         lambda a: a(WAYS["its GRPO's"].format("strong"), "text")
         - a("strong/sft --traces answer", "text")})
MEASURES = dict(captions=captions)

if __name__ == "__main__":
    run_paper(FINDING, None, None, __doc__, **MEASURES)
