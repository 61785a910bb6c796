"""Both languages have the same pages, headings, commands and tables; no link is dead."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ROOT / "docs/en", ROOT / "docs/zh_cn"
PAIRS = {path.name: (path, CHINESE / path.name) for path in sorted(ENGLISH.glob("*.md"))}
PAIRS["/README.md"] = (ROOT / "README.md", ROOT / "README_zh-CN.md")
PAGES = sorted(
    {page for pair in PAIRS.values() for page in pair} | set((ROOT / "docs").rglob("*.md"))
)

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^(#+) +(.+)$", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CHINESE_TEXT = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")

OTHER_TERMS = {
    "词元": "token",
    "令牌": "token",
    "优化步": "优化器步",
    "更新步": "优化器步",
    "小批次": "micro-batch",
    "微批次": "micro-batch",
    "map 函数": "映射函数",
    "提示模板": "对话模板",
    "聊天模板": "对话模板",
    "4 bit": "4 比特",
    "停止符": "停止词",
    "系统提示词": "系统提示",
    "系统文本": "系统提示",
    "提示词模板": "对话模板",
    "个 epoch": "轮",
    "钩子": "hook",
    "样例": "示例",
    "个进程共享": "个进程共用",
    "基础模型": "基座模型",
    "底座": "基座模型",
    "能看图": "视觉语言模型",
    "4 位": "4 比特",
    "8 位": "8 比特",
    "16 位": "16 比特",
    "名字": "名称",
    "全参数": "全量",
    "激活检查点": "激活重算",
    "学习率策略": "学习率调度",
    "学习率计划": "学习率调度",
    "主存": "内存",
    "内核": "算子",
    "张 GPU": "块 GPU",
}
"""Chinese words that mean what another one means here, and that one (the glossary's)."""


def text_of(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks_of(page: Path) -> list[tuple[str, list[str]]]:
    """Language and lines of each code block, without comments and alignment."""
    blocks = []
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        lines = [re.sub(r"(^|\s+)#.*$", "", line) for line in body.splitlines()]
        blocks.append((language, [" ".join(line.split()) for line in lines if line.strip()]))
    return blocks


def tables_of(page: Path) -> list[list[list[str]]]:
    """The cells of each row of each table, its ruled line left out."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in text_of(page).splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not inside:
            tables.append([])
        inside = True
        if not all(set(cell) <= set(":-") for cell in cells):
            tables[-1].append(cells)
    return tables


def names_in(text: str) -> list[str]:
    """What stands in backticks."""
    return [" ".join(code.split()) for code in CODE.findall(text)]


def in_chinese(text: str) -> bool:
    """Whether a text has Chinese characters."""
    return bool(CHINESE_TEXT.search(text))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    heads = [head for _, head in HEADING.findall(text_of(page))]
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", head).lower()).replace(" ", "-")
        for head in heads
    }


def differences(ours: list, theirs: list) -> list[str]:
    """What stands at places where two lists differ."""
    length = max(len(ours), len(theirs))
    padded = [list(items) + ["(nothing)"] * (length - len(items)) for items in (ours, theirs)]
    return [f"{mine!r} != {other!r}" for mine, other in zip(*padded, strict=True) if mine != other]


def test_both_languages_have_the_same_pages():
    assert {path.name for path in ENGLISH.iterdir()} == {path.name for path in CHINESE.iterdir()}


@pytest.mark.parametrize("name", PAIRS)
def test_headings(name):
    english, chinese = (
        [len(level) for level, _ in HEADING.findall(text_of(page))] for page in PAIRS[name]
    )
    assert english == chinese


@pytest.mark.parametrize("name", PAIRS)
def test_code_blocks(name):
    english, chinese = (blocks_of(page) for page in PAIRS[name])
    assert [language for language, _ in english] == [language for language, _ in chinese]
    for (_, ours), (_, theirs) in zip(english, chinese, strict=True):
        assert len(ours) == len(theirs), differences(ours, theirs)
        # A line of data or output may be in Chinese: then only its place is compared.
        unequal = [
            (mine, other)
            for mine, other in zip(ours, theirs, strict=True)
            if mine != other and not in_chinese(other)
        ]
        assert not unequal


@pytest.mark.parametrize("name", PAIRS)
def test_tables(name):
    english, chinese = (tables_of(page) for page in PAIRS[name])
    assert len(english) == len(chinese)
    for ours, theirs in zip(english, chinese, strict=True):
        assert [len(row) for row in ours] == [len(row) for row in theirs], differences(
            [row[0] for row in ours], [row[0] for row in theirs]
        )
        cells = [
            (mine, other)
            for rows in zip(ours, theirs, strict=True)
            for mine, other in zip(*rows, strict=True)
        ]
        unequal = [
            (mine, other)
            for mine, other in cells
            if sorted(names_in(mine)) != sorted(names_in(other))
            and not any(map(in_chinese, names_in(other)))
        ]
        assert not unequal


@pytest.mark.parametrize("name", PAIRS)
def test_names_in_the_text(name):
    """What is in backticks is in both pages; placeholders may be in Chinese."""
    english, chinese = (set(names_in(text_of(page))) for page in PAIRS[name])
    translated = {code for code in chinese if in_chinese(code)}
    assert not chinese - translated - english
    assert len(english - chinese) <= len(translated - english), {"only English": english - chinese}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for link in LINK.findall(text_of(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors_of(target), (
                f"{page.name}: {link}, the headings give {sorted(anchors_of(target))}"
            )


BROKEN_LINE = re.compile(r"[\u4e00-\u9fff\uff00-\uffef]\n *(?![-*|#>\d<]|\n)\S", re.MULTILINE)


@pytest.mark.parametrize("name", PAIRS)
def test_chinese_sentences_are_not_broken_into_lines(name):
    """A line break inside a sentence is shown as a space, which Chinese does not have."""
    text = re.sub(r"^(#|\||<).*\n", "\n", text_of(PAIRS[name][1]), flags=re.MULTILINE)
    broken = [text[found.start() - 20 : found.end() + 10] for found in BROKEN_LINE.finditer(text)]
    assert not broken


@pytest.mark.parametrize("word", OTHER_TERMS)
def test_one_chinese_term_for_each_concept(word):
    catalogue = ROOT / "xtuner/locale/zh_CN/LC_MESSAGES/xtuner.po"
    for page in [*(chinese for _, chinese in PAIRS.values()), catalogue]:
        lines = page.read_text(encoding="utf-8").splitlines()
        found = [
            f"{page.name}:{at}: {line}"
            for at, line in enumerate(lines, 1)
            if word in line and in_chinese(line)
        ]
        assert not found, f"write {OTHER_TERMS[word]}: {found}"


def test_both_glossaries_have_the_same_rows():
    english, chinese = (tables_of(page)[-1][1:] for page in PAIRS["README.md"])
    assert len(english) > 20
    assert [row[:2] for row in english] == [row[:2] for row in chinese]


def test_the_readme_is_short():
    for page in PAIRS["/README.md"]:
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 150, page
