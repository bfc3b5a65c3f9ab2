"""python tests/convert.py theirs.jsonl > ours.jsonl: chats (OpenAI's and TRL's `messages`, ShareGPT
and VLM-R1's `conversations`, TRL's `prompt` and `completion`) and Alpaca's rows, as flat rows that
--data reads. Fields that it does not know stay. Parquet: first datasets.load_dataset, then a row
for each example, with its picture saved.
"""
import json
import sys

PARTS = dict(system="system", user="question", human="question", assistant="response",
             gpt="response")             # by the role of a turn


def turns_of(row):
    """The turns of a chat, taken out of the row."""
    if isinstance(row.get("prompt"), list):
        return row.pop("prompt") + (row.pop("completion", None) or [])
    return row.pop("messages", None) or row.pop("conversations", None) or []


def flat(row):
    """-> the row with question, response, system and images in fields of their own."""
    if "instruction" in row:
        asked = [row.pop("instruction"), row.pop("input", None)]
        row["question"] = "\n".join(filter(None, asked))
    for turn in turns_of(row):
        name = PARTS[turn.get("role") or turn["from"]]
        content = turn.get("content") or turn.get("value") or ""
        parts = content if isinstance(content, list) else [{"text": content}]
        pictures = [value for part in parts for key, value in part.items()
                    if value and key not in ("type", "text")]
        fields = sum(map(bool, turn.values()))
        if row.get(name) or pictures and row.get("images") or fields > 2:
            sys.exit(f"error: a second {name}, two places of pictures, or more than a role and a "
                     f"content: {row}")
        row[name] = "".join("<image>" if part.get("text") is None else part["text"]
                            for part in parts)
        row["images"] = [one.get("url", one) if isinstance(one, dict) else one
                         for one in pictures] or row.get("images")
    return row


if __name__ == "__main__":
    for line in open(sys.argv[1], encoding="utf-8"):
        print(json.dumps(flat(json.loads(line))))
