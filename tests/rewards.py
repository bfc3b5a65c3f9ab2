"""The grader as other engines ask for it; this repository has to be on PYTHONPATH. They give
neither choices nor question: letters for a text, and rounding asked for, count as wrong.

    verl       custom_reward_function.path=tests/rewards.py
    EasyR1     worker.reward.reward_function=tests/rewards.py:batch
"""
import data
import evaluate


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """verl's: 1 for a right answer, else 0."""
    answer = data.extract_answer(solution_str)
    example = data.Example("", "", ground_truth, box=ground_truth.startswith("["))
    return float(evaluate.judge(answer, example) is True)


def batch(inputs):
    """EasyR1's."""
    return [dict(overall=compute_score("", one["response"], one["ground_truth"]))
            for one in inputs]
