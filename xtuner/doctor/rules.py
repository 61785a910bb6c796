"""The kinds of mistakes that the doctor knows: what each means and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner.utils.lang import tr

ERROR, WARNING, NOTE = "error", "warning", "note"
"""Errors stop or spoil the training, warnings likely harm it, notes are good to know."""


@dataclass(frozen=True)
class Kind:
    """One kind of mistake: how bad it is, its name and the advice, in English and Chinese."""

    level: str
    title_en: str
    title_zh: str
    advice_en: str
    advice_zh: str

    @property
    def title(self) -> str:
        return tr(self.title_en, self.title_zh)

    @property
    def advice(self) -> str:
        return tr(self.advice_en, self.advice_zh)


KINDS: Mapping[str, Kind] = {
    "bad-json": Kind(
        ERROR, "cannot be read", "无法读取",
        "mend or delete these lines; nothing can be trained on them.",
        "修复或删除这些行；它们无法用于训练。",
    ),
    "no-rows": Kind(
        ERROR, "the file has no rows", "文件里没有数据",
        "check that this is the right file.", "确认文件是否正确。",
    ),
    "not-an-object": Kind(
        ERROR, "the row is not an object", "这一行不是对象",
        'each row must be an object such as {"input": ..., "output": ...}.',
        '每一行都必须是对象，例如 {"input": ..., "output": ...}。',
    ),
    "missing-field": Kind(
        ERROR, "a field is missing", "缺少字段",
        "add the field, or use a map function that reads the fields which are there.",
        "补上字段，或换用与现有字段匹配的映射函数。",
    ),
    "wrong-type": Kind(
        ERROR, "a field has the wrong type", "字段类型错误",
        "turn the value into the type that the map function reads.",
        "把值改成映射函数需要的类型。",
    ),
    "wrong-map-fn": Kind(
        ERROR, "the map function does not fit the rows", "映射函数与数据不符",
        "put these lines into the config:", "把下面几行写进配置:",
    ),
    "mixed-layouts": Kind(
        ERROR, "rows of another layout than the rest", "数据格式混杂",
        "put rows of each layout into a file of their own and join the datasets with "
        "ConcatDataset, or use auto_map_fn.",
        "把不同格式的数据放进不同文件，用 ConcatDataset 合并；或使用 auto_map_fn。",
    ),
    "map-fn-failed": Kind(
        ERROR, "the map function fails on this row", "映射函数在这一行上出错",
        "mend the row or the function.", "修改这一行或映射函数。",
    ),
    "mixed-types": Kind(
        WARNING, "a field changes its type", "同一字段的类型不一致",
        "give the field one type in all rows; tables (Arrow) cannot hold two.",
        "让该字段在所有行里类型一致；表格（Arrow）不能同时存放两种类型。",
    ),
    "bad-role": Kind(
        ERROR, "an unknown role", "未知的角色",
        "rename the role, or use auto_map_fn, which knows the common spellings.",
        "修改角色名，或使用能识别常见写法的 auto_map_fn。",
    ),
    "role-order": Kind(
        WARNING, "roles out of order", "角色顺序错误",
        "user and assistant must take turns, the user first.",
        "user 和 assistant 必须交替出现，并以 user 开头。",
    ),
    "unanswered": Kind(
        WARNING, "the last question has no answer", "最后的问题没有回答",
        "it is dropped in training; add the answer or delete the message.",
        "训练时会被丢弃；请补上回答或删除这条消息。",
    ),
    "no-answer": Kind(
        WARNING, "no answer to train on", "没有可训练的回答",
        "the row is dropped; delete it or add an answer.",
        "这一行会被丢弃；请删除或补上回答。",
    ),
    "empty-question": Kind(
        WARNING, "an empty question", "问题为空",
        "fill it in or delete the row.", "补上问题或删除这一行。",
    ),
    "empty-answer": Kind(
        WARNING, "an empty answer", "回答为空",
        "the model would learn to say nothing; fill it in or delete the row.",
        "模型会学成什么都不说；请补上回答或删除这一行。",
    ),
    "placeholder": Kind(
        WARNING, "the answer is a placeholder", "回答是占位符",
        "a conversion probably went wrong; delete the row.", "很可能是转换出错；请删除这一行。",
    ),
    "not-trained": Kind(
        WARNING, "loss is switched off for every answer", "所有回答都关闭了损失",
        "the row teaches nothing; set output_with_loss (or loss) to true for an answer.",
        "这一行不起作用；请至少为一个回答设置 output_with_loss（或 loss）为 true。",
    ),
    "template-token": Kind(
        WARNING, "a template's own token inside the content", "内容里含有模板的特殊标记",
        "the model takes it for a border; delete it from the data (the template adds it).",
        "模型会把它当作边界；请从数据里删除（模板会自动添加）。",
    ),
    "invisible": Kind(
        WARNING, "invisible or control characters", "不可见字符或控制字符",
        "they become tokens that nobody sees; delete them.",
        "它们会变成看不见的词元；请删除。",
    ),
    "broken-unicode": Kind(
        WARNING, "broken characters", "字符损坏",
        "the text was read in a wrong encoding or cut inside a character; export it as UTF-8.",
        "文本曾以错误的编码读取，或在字符中间被截断；请重新以 UTF-8 导出。",
    ),
    "duplicate": Kind(
        WARNING, "the same row again", "重复的数据",
        "a row seen twice counts twice; delete the copies.", "重复的行会被多次训练；请删除副本。",
    ),
    "same-choice": Kind(
        WARNING, "chosen and rejected are the same", "chosen 与 rejected 相同",
        "the pair teaches nothing; delete it.", "这一对不起作用；请删除。",
    ),
    "missing-image": Kind(
        ERROR, "an image is missing", "找不到图片",
        "correct image_folder in the config or the path in the row.",
        "修改配置里的 image_folder 或这一行的路径。",
    ),
    "image-mark": Kind(
        WARNING, "<image> and the row's image do not agree", "<image> 与图片字段不一致",
        "a row with an image needs <image> in a question, a row without one must not have it.",
        "有图片的行需要在问题里写 <image>，没有图片的行不能写。",
    ),
    "open-code-block": Kind(
        NOTE, "an answer ends inside a code block", "回答在代码块内结束",
        "the answer may have been cut when it was made.", "回答在生成时可能被截断了。",
    ),
    "cut": Kind(
        WARNING, "cut at max_length: the end of the answer is lost",
        "超过 max_length，回答结尾被截断",
        "raise max_length, or shorten the rows.", "增大 max_length，或缩短数据。",
    ),
    "no-supervised-token": Kind(
        WARNING, "no token to train on", "没有可训练的词元",
        "the question alone fills max_length, or the answer is empty; the row is dropped.",
        "问题已占满 max_length，或回答为空；这一行会被丢弃。",
    ),
    "no-stop": Kind(
        WARNING, "a trained answer does not end in a stop token", "训练的回答没有以停止符结尾",
        "the model will not learn to stop; use the prompt_template of this model.",
        "模型学不会停止；请使用与模型匹配的 prompt_template。",
    ),
    "cannot-build": Kind(
        ERROR, "training cannot build this dataset", "训练时无法构建这个数据集",
        "mend what the message says.", "请按提示修复。",
    ),
    "very-long": Kind(
        NOTE, "a very long row", "超长的数据",
        "look at it: often several rows have been joined by mistake.",
        "请检查；常见原因是多行数据被误合并。",
    ),
}  # fmt: skip
"""Every kind by its code."""
