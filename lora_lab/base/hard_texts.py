"""Texts on which tokenizers differ that are nearly the same: two that agree on all of them split, normalize and join alike."""

HARD_TEXTS = (
    "Hello world", " Hello", "  two blanks first", "blanks last  ", "a  b   c    d     e", "tabs\tand\t\tmore\t", "\t\tindented\n\t\t\tmore",
    "\n", "\n\n", "\n\n\n", " \n \n", "\r\n", "line\r\nline\r\n\r\nline", "a\rb", "Steps:\n\n1. Go\n2. Come\n\n10. End", "\n1. one\n2) two\n  3. three",
    "1", "12", "123", "1234", "12345", "1234567890", "3.14159", "1,000,000.50", "v1.2.3-rc4", "2026-11-28 13:05:59", "0x1F 0b101 1e-9",
    "a1b22c333d4444", "½ ¼ ² ³ ① Ⅷ ٣٤٥ ១២៣", "１２３ ＡＢＣ ａｂｃ！？", "don't I'll we've they're it's I'm he'd", "DON'T I'LL WE'VE THEY'RE IT'S I'M HE'D",
    "Don’t I’ll we’ve", "'s 's's 'tis rock'n'roll O'Neil", "camelCase PascalCase HTTPServer iPhone McDonald XMLHttp2Request", "ÉCOLE École école ÄÖÜäöüß ŁÓDŹ",
    "snake_case __init__ --flag -x /usr/local/bin C:\\Windows\\System32", "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b->c; }", "<div class=\"x\">&nbsp;</div>", "{\"key\": [1, 2.5, null], \"ключ\": \"值\"}", "SELECT * FROM t WHERE a<>'b';",
    "https://example.org/a?b=c&d=%20#e user@mail.com", "$5 €10 £3 ¥100 5% #tag @name ~x ^y `z` |w| <v> =u= +t+", "...!!!???---___***///\\\\\\", "!?!\n\n?!", "(a)[b]{c}\"d\"'e'",
    "…—–-‐‑ “quoted” ‘single’ «guillemets» „low“", "• item\n● item\n◦ item", "→ ← ↑ ≈ ≠ ≤ ∑ √ ∞ © ® ™", "你好，世界！", "从前有座山，山里有座庙。", "今天是2026年11月28日，气温12.5度。",
    "中文English混排123测试", "第一章\n\n1、开始\n2、结束\n", "　全角空格　开头", "“你好”，他说：‘再见’……——！", "繁體中文字體", "日本語のテスト、ひらがなとカタカナ。", "한국어 테스트입니다. 안녕하세요!",
    "Привет, мир! Ещё раз.", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم، كيف حالك؟", "नमस्ते दुनिया, यह हिन्दी है।", "สวัสดีชาวโลก ภาษาไทย", "Tiếng Việt có dấu", "বাংলা ভাষা தமிழ் మొదటి",
    "é ñ ü å", "e\u0301 n\u0303 u\u0308 a\u030a", "Z\u0351\u0343a\u0310l\u0301g\u0303o", "a\u00a0b\u00a0\u00a0c", "a\u2009b\u200ac\u3000d", "zero\u200bwidth\u200cjoiner\u200d\ufeffbom", "soft\u00adhyphen",
    "🙂", "🙂🙂🙂 text 🎉", "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇦🇹🇨🇳", "👍🏽 ✌🏿 ❤️ ☺", "🚀 1. go\n🚀 2. stop", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛", "ﬁ ﬂ ﬀ Ⅻ ℃ №", "ａ\u3099 ｶﾞ ㈱", "\u0131 İ ǅ ß ẞ",
    "word\n\n\nword", "word \n\n word", "word\n \n\t\nword", " \t \n", "   ", "                ", "\n    x\n        y\n            z", "end with newline\n", "end with blanks\n   ",
    "A. B. C.\nD) E)\n", "Q: What is 2+2?\nA: 4\n", "**bold** _it_ ~~no~~ `code` # H1\n## H2\n- [ ] todo", "| a | b |\n|---|---|\n| 1 | 2 |", "$$\\int_0^1 x^2\\,dx = \\frac{1}{3}$$",
    "AAAAAAAAAAAAAAAA bbbbbbbbbbbbbbbbbb", "Ünïcödé123mixed456", "x=1;y=22;z=333;w=4444", "10:30am 5kg 20°C 100km/h", "\u0001\u001f\u007f\u0085\u2028\u2029", "𠮷野家 𪚥", "ΑΒΓαβγΆΈάέ", "١٢٣ ۱۲۳ १२३ ๑๒๓", "ǄǅǆǇǈ ʰʲ ªº",
)  # fmt: skip
