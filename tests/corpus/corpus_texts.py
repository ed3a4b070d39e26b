"""Made-up documents of a few domains, for models that label text."""

import random

WORDS = {
    "English": "the cat and dog were sitting on a mat while it rained over every house of that old town".split(),
    "mathematics": "let x be an element of the group such that f ( x ) = y + 2 and \\frac{a}{b} integral".split(),
    "Chinese": ["选择一个命令", "打开文件", "在此输入文本", "显示或隐藏工具栏", "单元格", "使用键盘"],
}


def documents(count: int, seed: int = 0, words: int = 12) -> tuple[list[str], list[str]]:
    """(texts, labels): so many documents of each domain, of random words of it, domains one after the other."""
    generator = random.Random(seed)
    texts, labels = [], []
    for name, vocabulary in WORDS.items():
        texts += [" ".join(generator.choices(vocabulary, k=words)) for _ in range(count)]
        labels += [name] * count
    return texts, labels
