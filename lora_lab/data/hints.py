"""What to say about columns that go by other names than ours: the whole `data.columns` option, ready to copy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

# Names that our columns go by elsewhere, likeliest first; compared without case, blanks and hyphens as _.
_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "prompt": (
        "question", "instruction", "query", "q", "input", "user", "human", "problem", "request", "context", "src", "source",
        "question_text", "ask", "问题", "提问", "指令", "输入", "问",
    ),
    "completion": (
        "answer", "response", "output", "reply", "a", "assistant", "bot", "gpt", "solution", "target", "tgt", "answer_text", "completions",
        "答案", "回答", "回复", "输出", "答",
    ),
    "chosen": ("accepted", "preferred", "better", "response_chosen", "answer_chosen", "chosen_response", "positive"),
    "rejected": ("declined", "dispreferred", "worse", "response_rejected", "answer_rejected", "rejected_response", "negative"),
    "instruction": ("指令",),
    "output": ("response", "answer", "输出", "回答"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns", "message"),
    "conversations": ("conversation",),
    "text": (
        "sentence", "review", "content", "comment", "tweet", "document", "body", "sentence1", "premise", "question1", "text1",
        "review_text", "utterance", "article", "post", "title", "文本", "评论", "内容", "句子",
    ),
    "text_pair": ("sentence2", "hypothesis", "question2", "text2", "text_b"),
    "text_b": ("sentence2", "text_pair", "text2", "hypothesis", "question2"),
    "label": (
        "class", "category", "sentiment", "labels", "target", "stars", "rating", "score", "intent", "emotion", "topic", "gold_label", "y",
        "标签", "类别", "分类", "情感",
    ),
    "source": ("src", "article", "document", "dialogue", "input", "text", "question", "原文"),
    "target": ("tgt", "summary", "highlights", "translation", "output", "answer", "译文", "摘要"),
    "tokens": ("words",),
    "tags": ("ner_tags", "ner", "pos_tags", "chunk_tags", "labels", "label"),
    "answers": ("answer",),
    "context": ("passage", "paragraph", "document"),
    "question": ("query",),
    "query": ("anchor", "question", "q", "sentence1", "query_text", "问题", "查询"),
    "positive": ("pos", "document", "passage", "context", "answer", "positive_passage", "positive_text", "sentence2", "文档", "段落"),
    "negative": ("neg", "hard_negative", "negative_passage", "negative_text"),
    "negatives": ("neg", "hard_negatives", "negative_passages"),
    "text_a": ("sentence1", "text", "text1", "premise", "question1"),
    "score": ("label", "similarity", "similarity_score", "gold"),
    "system": ("system_prompt", "system_message", "systemprompt", "sys_prompt", "系统"),
    "history": ("context_history", "chat_history"),
}  # fmt: skip


def option(mapping: Mapping[str, str]) -> str:
    """The override that says how our columns are called in the file, as a shell takes it."""
    pairs = ", ".join(f"{ours}: {_quoted(theirs)}" for ours, theirs in mapping.items())
    return f'"data.columns={{{pairs}}}"'


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) else "'" + name.replace("'", "\\'") + "'"


def mapping_for(formats: Iterable[Sequence[str]], columns: Sequence[str]) -> dict[str, str] | None:
    """Our columns to the file's, for the format that reads most of them, with the fewest changes; None if no format can be made of these columns.

    Args:
        formats: the columns of each format, best first.
    """
    found = [
        (-len(needed), len(mapping), mapping) for needed in formats if (mapping := _mapped(needed, columns)) is not None
    ]
    return min(found, key=lambda one: one[:2], default=(0, 0, None))[2] or None


def _mapped(needed: Sequence[str], columns: Sequence[str]) -> dict[str, str] | None:
    free = {_plain(column): column for column in reversed(columns)}
    mapping = {}
    for ours in sorted(needed, key=lambda name: name not in columns):
        theirs = next((free.pop(name) for name in (ours, *_ELSEWHERE.get(ours, ())) if name in free), None)
        if theirs is None:
            return None
        if theirs != ours:
            mapping[ours] = theirs
    return {ours: mapping[ours] for ours in needed if ours in mapping}


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def ours_for(column: str, optional: Iterable[str]) -> str | None:
    """Which of our optional columns a column that is not read may be meant as."""
    return next((ours for ours in optional if _plain(column) in (_plain(ours), *_ELSEWHERE.get(ours, ()))), None)


def turned(mapping: Mapping[str, str], columns: Sequence[str], known: Iterable[str]) -> dict[str, str] | None:
    """The mapping with those entries the right way round that were the wrong way; None if there are none."""
    known = set(known)
    wrong = {
        ours: theirs
        for ours, theirs in mapping.items()
        if theirs not in columns and ours in columns and theirs in known
    }
    if not wrong:
        return None
    return {wrong.get(ours, ours): ours if ours in wrong else theirs for ours, theirs in mapping.items()}
