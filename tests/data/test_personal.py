"""What is personal in a text is found and masked, and nothing else is."""

from __future__ import annotations

import json

import pytest

from lora_lab.data import personal
from lora_lab.data.personal import KINDS, MARKS, masked, masked_within, spans

pytestmark = pytest.mark.skipif(bool(personal.missing()), reason='needs pip install "lora-lab[text]"')

# Numbers are made up or published as examples, with checksums that fit.
PERSONAL = [
    ("email", "jane.doe+x@mail.example.co.uk", "Write to {}, please."),
    ("email", "li_wei@example.com", "我的邮箱是{}，谢谢"),
    ("email", "müller@exämple.de", "an {}!"),
    ("email", "ｌｉ＠ｅｘａｍｐｌｅ．ｃｏｍ", "邮箱：{}。"),
    ("email", "o'neil@example.org", "<{}>"),
    ("email", "a@b.xn--p1ai", "mailto:{}?subject=x"),
    ("phone", "13812345678", "电话{}，谢谢"),
    ("phone", "138 1234 5678", "手机 {} 微信同号"),
    ("phone", "１３８１２３４５６７８", "请拨打{}。"),
    ("phone", "138\u200b1234\u200b5678", "手机 {}"),
    ("phone", "+86 138-1234-5678", "{}"),
    ("phone", "010-62345678", "固定电话：{}"),
    ("phone", "0571-88888888", "杭州 {} 转 2"),
    ("phone", "400-820-8820", "客服 {}"),
    ("phone", "(212) 736-5000", "Call {} now"),
    ("phone", "650.253.0000", "fax {}"),
    ("phone", "2127365000", "my phone is {}"),
    ("phone", "+49 151 23456789", "Tel.: {}."),
    ("phone", "020 7946 0018", "London {}"),
    ("phone", "01 42 68 53 00", "Paris : {}"),
    ("phone", "+91 98765 43210", "{}, India"),
    ("card", "4111 1111 1111 1111", "card {} exp 12/27"),
    ("card", "4111111111111111", "卡号{}。"),
    ("card", "5500-0055-5555-5559", "MC {}"),
    ("card", "3782 822463 10005", "Amex {}"),
    ("card", "6222021234567890128", "银行卡{}，户名李伟"),
    ("iban", "DE89 3704 0044 0532 0130 00", "IBAN {} BIC COBADEFF"),
    ("iban", "GB82WEST12345698765432", "pay {}, please"),
    ("iban", "fr14 2004 1010 0505 0001 3m02 606", "{}"),
    ("iban", "NL91ABNA0417164300", "账户{}"),
    ("id_number", "11010519491231002X", "身份证号{}。"),
    ("id_number", "440524 18800101 0014", "ID {}"),
    ("id_number", "１１０１０５１９４９１２３１００２Ｘ", "身份证：{}"),
    ("id_number", "536-22-8726", "SSN {}"),
    ("id_number", "536228726", "social security number {}"),
    ("id_number", "390.533.447-05", "CPF {}"),
    ("id_number", "RCCMNL83S18D969H", "codice fiscale {}"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "secret", "text"), PERSONAL)
def test_what_is_personal_is_masked(kind, secret, text):
    assert masked(text.format(secret)) == (text.format(MARKS[kind]), {kind: 1})
    assert masked(text.format(secret), [one for one in KINDS if one != kind])[1][kind] == 0


@pytest.mark.parametrize(
    "text",
    [
        "", "no numbers", "on 2024-03-15 at 10:30", "order 20240315123456", "pi is 3.14159265358", "192.168.10.125",
        "http://127.0.0.1:8000", "version 1.2.3.4567", "ISBN 978-3-16-148410-0", "price 1,234,567.89", "12345678", "1700000000",
        "2024年3月15日", "订单号2024031512345678", "30 40 50 60 70 80", "1990-1999, 2000-2009", "0.00012345678", "id 4294967296",
        "population 1412000000", "1 000 000 000", "0x7fff1234567", "4111 1111 1111 1112", "11010519491231002 1", "110105194912310021",
        "DE89 3704 0044 0532 0130 01", "000-12-3456", "666-12-3456", "@home", "a@b", "x @ y.com", "see you @ 10.30", "@user.name",
        "0.4111111111111111", "sha 4111111111111111abcdef", "R-2041", "50 % of 1000000", "2 + 2 = 4", "A1B2C3D4", "[EMAIL] [PHONE] [ID]",
        "16:9, 1920x1080", "2019-2020 season", "loss 0.6931471805599453", "电话是什么", "第 123456 号", "@张三 你好", "RFC 5321", "1e-05",
    ],
)  # fmt: skip
def test_what_is_not_personal_stays(text):
    assert masked(text) == (text, {})


def test_several_in_one_text_and_a_second_time():
    text = "李伟（li@example.com，13812345678）付款至DE89370400440532013000；4111-1111-1111-1111, 536-22-8726"
    once, counts = masked(text)
    assert once == "李伟（[EMAIL]，[PHONE]）付款至[IBAN]；[CARD], [ID]"
    assert counts == {"email": 1, "phone": 1, "iban": 1, "card": 1, "id_number": 1}
    assert masked(once) == (once, {})
    assert [text[one.start : one.end] for one in spans(text, ["phone"])] == ["13812345678"]


def test_texts_within_other_things():
    value = {"role": "user", "content": [{"text": "a@b.com"}, 13812345678, None], "a@b.com": True}
    found, counts = masked_within(value)
    assert found == {"role": "user", "content": [{"text": "[EMAIL]"}, 13812345678, None], "a@b.com": True}
    assert counts == {"email": 1}


@pytest.mark.parametrize("text", ["a" * 50_000 + "@", "1" * 50_000, "1-" * 25_000, "a.@" * 20_000, "DE89 " * 10_000])
def test_no_text_takes_for_ever(text):
    """The programme's own time limit is what would fail here."""
    assert isinstance(masked(text)[0], str)


SECRETS = ("li@example.com", "13812345678", "4111 1111 1111 1111")


@pytest.fixture
def rows(tmp_path):
    """A conversation with personal data in its question, its answer and a call; and one without."""
    answer = {"role": "assistant", "content": f"Noted: {SECRETS[0]}, {SECRETS[2]}."}
    told = [{"role": "user", "content": f"I am {SECRETS[0]}, 电话{SECRETS[1]}"}, answer]
    plain = [{"role": "user", "content": "red cat"}, {"role": "assistant", "content": "blue bird"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": one}, ensure_ascii=False) + "\n" for one in (told, plain)))
    return file


def test_cleaning_masks_questions_and_answers(base, rows):
    from lora_lab.config import compose
    from lora_lab.data import build
    from lora_lab.run.prepared import find_base

    told = ["model=hub", f"model.path={base}", f"data.train={rows}", "quant=none"]
    for more, holds in (([], True), (["data.clean=[mask_pii]"], False)):
        config = compose.compose([*told, *more])
        encoder = find_base(config).encoder
        data = build.build(config.data, encoder)
        assert data.train is not None
        text = encoder.tokenizer.decode(data.train[0][0].input_ids)
        said = json.dumps(data.train[0][0].messages)
        assert all((secret in text) is holds for secret in SECRETS[:1]), text
        assert (SECRETS[1] in encoder.prompt([{"role": "user", "content": SECRETS[1]}])) is holds
        assert ("[EMAIL]" in said and "[CARD]" in said) is not holds


def test_the_verb_counts_by_kind(base, rows, capsys, tmp_path):
    from lora_lab import cli

    told = ["model=hub", f"model.path={base}", f"data.train={rows}", "quant=none", f"run_dir={tmp_path}/run"]
    assert cli.main(["data", *told, "--html", str(tmp_path / "page.html")]) == 0
    sentence = "personal data in 1 of 2 rows: 2 e-mail addresses, 1 card numbers, 1 phone numbers."
    assert f"warning: data.train: {sentence} data.clean=[mask_pii] masks them." in capsys.readouterr().out
    assert cli.main(["data", *told, "data.clean=[mask_pii]", "--html", str(tmp_path / "page.html")]) == 0
    assert f"note: data.train: {sentence} data.clean masks them." in capsys.readouterr().out


@pytest.mark.parametrize("task", ["token_classification", "question_answering"])
def test_labels_at_places_of_a_text_go_with_no_cleaning(task, rows, base, capsys):
    from tests.conftest import fails

    told = [f"task={task}", "model=hub", f"model.path={base}", f"data.train={rows}", "data.clean=[mask_pii]"]
    assert f"data.clean: no effect with task={task}" in fails(["train", *told], capsys)


def test_without_the_packages_the_verb_says_that_nothing_is_counted(monkeypatch):
    from lora_lab.data import check

    monkeypatch.setattr(personal, "PACKAGES", ("no_such_library",))
    [finding] = check.personal_data(None, None)
    assert "personal data is not counted, which needs no_such_library. pip install 'lora-lab[text]'" in str(finding)
