"""The sample data set as it is shipped, and the parts of the program that built it."""

import difflib
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, List, Value, load_dataset
from huggingface_hub import DatasetCard
from PIL import Image as PIL

from mimic_el.datasets_scripts import build_sample, sample_entities, sample_images, sample_text
from mimic_el.datasets_scripts.sample_entities import Drawing, Entity, Name, Package, PackageStore, SampleError
from mimic_el.datasets_scripts.sample_text import Forms, Text

SAMPLE = Path(build_sample.__file__).parent / "sample"
RING = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10">'
    '<rect width="20" height="10" fill="#c00"/><circle cx="5" cy="5" r="3" fill="#ff0"/></svg>'
)


@pytest.fixture(scope="module")
def mentions(tmp_path_factory: pytest.TempPathFactory) -> DatasetDict:
    splits = load_dataset(str(SAMPLE), "mentions", cache_dir=str(tmp_path_factory.mktemp("cache")))
    return DatasetDict({name: split.cast_column("image", Image(decode=False)) for name, split in splits.items()})


@pytest.fixture(scope="module")
def kb(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    entities = load_dataset(str(SAMPLE), "entities", split="kb", cache_dir=str(tmp_path_factory.mktemp("cache")))
    return entities.cast_column("images", List(Image(decode=False)))


@pytest.fixture(scope="module")
def entities() -> list[Entity]:
    return sample_entities.read_entities()


@pytest.fixture(scope="module")
def forms() -> Forms:
    return sample_text.read_forms()


def digests(split: Dataset) -> list[str]:
    return [hashlib.sha256(image["bytes"]).hexdigest() for image in split["image"] if image is not None]


class TestShippedData:
    def test_columns(self, mentions: DatasetDict, kb: Dataset) -> None:
        text = Value("string")
        assert set(mentions) == {"train", "validation", "test"}
        for split in mentions.values():
            expected = dict.fromkeys(("id", "mention", "sentence", "answer", "kind", "form", "drawing"), text)
            assert dict(split.features) == expected | {"image": Image(decode=False)}
        expected = dict.fromkeys(("id", "qid", "name", "description", "category"), text)
        assert dict(kb.features) == expected | {"images": List(Image(decode=False))}

    def test_ids_are_unique_and_answers_exist(self, mentions: DatasetDict, kb: Dataset) -> None:
        ids = [id for split in mentions.values() for id in split["id"]]
        assert len(ids) == len(set(ids))
        assert len(kb["id"]) == len(set(kb["id"]))
        for split in mentions.values():
            assert set(split["answer"]) <= set(kb["id"])

    def test_every_entity_is_seen_in_training(self, mentions: DatasetDict, kb: Dataset) -> None:
        assert set(mentions["train"]["answer"]) == set(kb["id"])

    def test_is_small(self) -> None:
        assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 5_000_000

    def test_kinds_are_balanced(self, mentions: DatasetDict) -> None:
        for split in mentions.values():
            counts = Counter(split["kind"])
            assert set(counts) == {"text", "image", "both"}
            assert len(set(counts.values())) == 1

    def test_texts_and_images_decide_between_entities_of_one_name(self, mentions: DatasetDict, kb: Dataset) -> None:
        names = dict(zip(kb["id"], kb["name"], strict=True))
        categories = dict(zip(kb["id"], kb["category"], strict=True))
        senses = defaultdict(list)
        for id, name in names.items():
            senses[name.lower()].append(id)
        for split in mentions.values():
            for row in split:
                if row["kind"] == "both":
                    continue
                assert row["mention"].lower() == names[row["answer"]].lower()
                others = [id for id in senses[row["mention"].lower()] if id != row["answer"]]
                assert others, row["id"]
                if row["kind"] == "text":
                    assert categories[row["answer"]] not in {categories[id] for id in others}

    def test_texts_of_kind_image_tell_nothing(self, mentions: DatasetDict, kb: Dataset, forms: Forms) -> None:
        names = dict(zip(kb["id"], kb["name"], strict=True))
        for name, split in mentions.items():
            for row in split:
                if row["kind"] == "image":
                    # The form is one for all, and the capital the form's, not the name's.
                    assert row["form"] in forms.neutral[name]
                    small = row["form"] == row["form"].lower()
                    assert row["mention"] == (names[row["answer"]].lower() if small else names[row["answer"]])

    def test_images_are_where_the_kind_says(self, mentions: DatasetDict) -> None:
        for split in mentions.values():
            for row in split:
                assert (row["drawing"] is None) == (row["kind"] == "text")
                assert row["image"] is not None or row["kind"] == "text"
            shown = [row["image"] is not None for row in split if row["kind"] == "text"]
            assert 0.35 < np.mean(shown) < 0.65

    def test_texts_contain_their_mention(self, mentions: DatasetDict) -> None:
        for split in mentions.values():
            assert all(row["mention"] in row["sentence"] for row in split)

    def test_texts_follow_their_form(self, mentions: DatasetDict, kb: Dataset, forms: Forms) -> None:
        categories = dict(zip(kb["id"], kb["category"], strict=True))
        agreeing = {"this": "this|these", "is": "is|are", "was": "was|were", "has": "has|have", "does": "does|do"}
        agreeing |= {"it": "it|they", "them": "it|them", "its": "its|their", "s": "s|", "an": "a|an"}
        for split in mentions.values():
            for row in split:
                slots = forms.slots["neutral" if row["kind"] == "image" else categories[row["answer"]]]
                pattern = ""
                for i, part in enumerate(re.split(r"(\{(?:the|a|some)\} |\{\w+\})", row["form"], flags=re.IGNORECASE)):
                    key = part.strip(" {}").lower()
                    if i % 2 == 0:
                        pattern += re.escape(part)
                    elif key in ("the", "a", "some"):
                        pattern += "(?:(?:the|a|an|some) )?"
                    elif key == "m":
                        pattern += re.escape(row["mention"])
                    else:
                        pattern += "(?:" + (agreeing.get(key) or "|".join(map(re.escape, slots[key]))) + ")"
                assert re.fullmatch(pattern, row["sentence"], re.IGNORECASE), row

    def test_splits_share_no_text_form(self, mentions: DatasetDict, kb: Dataset, forms: Forms) -> None:
        categories = dict(zip(kb["id"], kb["category"], strict=True))
        seen: dict[str, str] = {}
        for name, split in mentions.items():
            for row in split:
                if row["kind"] != "image":
                    pools = forms.pools[categories[row["answer"]]].values()
                    assert row["form"] in {form for pool in pools for form in pool[name]}, row["id"]
                assert seen.setdefault(row["form"], name) == name
        assert not set(mentions["train"]["form"]) & set(mentions["test"]["form"])

    def test_no_form_is_a_near_copy_of_one_in_another_split(self, forms: Forms) -> None:
        def words(form: str) -> list[str]:
            return re.findall(r"[\w']+", form.lower())

        pools = [(forms.neutral,), *(tuple(named.values()) for named in forms.pools.values())]
        for group in pools:
            split_forms = {split: [words(f) for pool in group for f in pool[split]] for split in sample_text.SPLITS}
            for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
                matcher = difflib.SequenceMatcher(autojunk=False)
                for second in split_forms[other]:
                    matcher.set_seq2(second)
                    for first in split_forms[one]:
                        matcher.set_seq1(first)
                        assert matcher.quick_ratio() < 0.75 or matcher.ratio() < 0.75, (first, second)

    def test_no_phrase_gives_an_entity_away(self, mentions: DatasetDict) -> None:
        phrases: dict[str, Counter[str]] = defaultdict(Counter)
        forms: dict[str, Counter[str]] = defaultdict(Counter)
        count: Counter[str] = Counter()
        for row in (row for split in mentions.values() for row in split if row["kind"] != "image"):
            words = re.findall(r"\w+|[^\w\s]", row["sentence"].replace(row["mention"], "_", 1).lower())
            for pair in {pair for pair in itertools.pairwise(words) if "_" not in pair}:
                phrases[" ".join(pair)][row["answer"]] += 1
            forms[row["form"]][row["answer"]] += 1
            count[row["answer"]] += 1
        for phrase, entities in phrases.items():
            # No entity has a phrase to itself; what is in most of its texts ("of the") is in those of many others.
            assert entities.total() < 6 or len(entities) >= 3, phrase
            often = max((uses / count[id] for id, uses in entities.items() if count[id] >= 6), default=0)
            assert often <= 0.5 or len(entities) >= 20, phrase
        for form, entities in forms.items():
            assert entities.total() < 6 or len(entities) >= 3, form

    def test_texts_are_varied(self, mentions: DatasetDict) -> None:
        for split in mentions.values():
            assert len(set(split["sentence"])) > 0.9 * len(split)
        # No form makes up much of what a reader sees.
        assert Counter(mentions["train"]["form"]).most_common(1)[0][1] < 0.012 * len(mentions["train"])

    def test_texts_are_written_as_english_is(self, mentions: DatasetDict) -> None:
        for row in (row for split in mentions.values() for row in split):
            text, chat = row["sentence"], row["form"] == row["form"].lower()
            for article, word in re.findall(r"\b(an?) '?([\w-]+)", text, re.IGNORECASE):
                vowel = re.match(r"[aeiou]|hour|honest|x-ray", word.lower())
                consonant = re.match(r"uni|us[eu]|eu|one\b", word.lower())
                assert (article.lower() == "an") == bool(vowel and not consonant), text
            assert not re.search(r"\b([\w']+) \1\b", text, re.IGNORECASE), text
            determiner = "(?:a|an|the|some|these|this)"
            assert not re.search(rf"\b{determiner} {determiner}\b", text, re.IGNORECASE), text
            assert text == " ".join(text.split())
            assert not re.search(r" [,.:;!?]|[,;:][^\s\d'\"]|\{|\}", text), text
            if chat:
                assert text == text.lower()
                continue
            plain = text.replace(row["mention"], "M")
            assert re.match(r"['\"]?[A-Z0-9£$€]", plain), text
            assert not re.search(r"[a-z][.!?] [a-z]", plain), text
            # A headline, a caption or a line of a list has no full stop; two sentences have two.
            assert text[-1] in ".!?)'" or not re.search(r"[a-z][.!?] ", plain), text

    def test_number_agrees(self, mentions: DatasetDict, kb: Dataset, entities: list[Entity]) -> None:
        nouns = {(e.id, n.text.lower()): n.noun for e in entities for n in (Name(e.name, e.noun), *e.aliases)}
        for row in (row for split in mentions.values() for row in split if row["kind"] != "image"):
            plural = nouns[row["answer"], row["mention"].lower()] == "plural"
            mention, text = re.escape(row["mention"]), row["sentence"]
            # The verb of a mention that is not the subject belongs to another noun: "engineers at Shell are".
            singular_verb = re.search(rf"{mention} (?:is|was|has|does)\b", text)
            plural_verb = re.match(rf"(?:The |An? )?{mention} (?:are|were|have|do)\b", text, re.IGNORECASE)
            assert not (singular_verb if plural else plural_verb), text
            wrong = "an?|this|one|every|each" if plural else "these|those|many"
            assert not re.search(rf"\b(?:{wrong}) {mention}\b", text, re.IGNORECASE), text

    def test_splits_share_no_image(self, mentions: DatasetDict, kb: Dataset) -> None:
        seen = {hashlib.sha256(image["bytes"]).hexdigest() for images in kb["images"] for image in images}
        for split in mentions.values():
            images = digests(split)
            assert len(images) == len(set(images))
            assert not seen & set(images)
            seen |= set(images)

    def test_images_are_small_rgb_squares(self, mentions: DatasetDict, kb: Dataset) -> None:
        images = [image for images in kb["images"] for image in images]
        images += [image for image in mentions["test"]["image"] if image is not None]
        for image in images:
            with PIL.open(io.BytesIO(image["bytes"])) as file:
                assert (file.format, file.mode, file.size) == ("WEBP", "RGB", (64, 64))

    def test_texts_are_short(self, mentions: DatasetDict, kb: Dataset) -> None:
        def words(text: str) -> int:
            return len(re.findall(r"\w+|[^\w\s]", text))

        for split in mentions.values():
            assert max(words(row["mention"]) + words(row["sentence"]) for row in split) <= 37
        assert max(words(row["name"]) + words(row["description"]) for row in kb) <= 37

    def test_knowledge_base_is_the_list_of_entities(self, kb: Dataset, entities: list[Entity]) -> None:
        assert [(e.id, e.name, e.description) for e in entities] == list(
            zip(kb["id"], kb["name"], kb["description"], strict=True)
        )
        assert set(kb["qid"]) == {None}
        assert all(1 <= len(images) <= sample_entities.KB_IMAGES for images in kb["images"])
        packages = {name.removeprefix("@iconify-json/") for name in sample_entities.PACKAGES}
        for images in kb["images"]:
            # An image's name tells whose drawing it is, and no two are by the same hand.
            sources = [image["path"].split(".")[-2] for image in images]
            assert len(sources) == len(set(sources))
            assert set(sources) <= packages

    def test_card(self, mentions: DatasetDict, kb: Dataset) -> None:
        card = DatasetCard.load(SAMPLE / "README.md")
        data = card.data.to_dict()
        assert data["language"] == ["en"]
        assert {config["config_name"] for config in data["configs"]} == {"mentions", "entities"}
        for name, split in mentions.items():
            kinds = Counter(split["kind"])
            assert f"| {name} | {len(split):,} | {kinds['text']:,} | {kinds['image']:,} |" in card.text
        assert f"The knowledge base has {len(kb):,} entities" in card.text
        for package in sample_entities.PACKAGES.values():
            assert f"| {package.name} | {package.version} | {package.license} |" in card.text
        used = {drawing for split in mentions.values() for drawing in split["drawing"]} - {None}
        assert used <= {name.removeprefix("@iconify-json/") for name in sample_entities.PACKAGES}


class TestInputs:
    def test_every_category_has_forms_and_several_entities(self, entities: list[Entity], forms: Forms) -> None:
        counts = Counter(entity.category for entity in entities)
        assert set(counts) == set(forms.pools)
        assert min(counts.values()) >= 4
        # A form shared by a few entities at least gives none of them away.
        sample_text.check_pools(entities, forms)

    @pytest.mark.parametrize(
        ("pools", "message"), [(["any"] * 2, "2 entities"), (["any"] * 3 + ["sea"], r"no forms \[category.bird.sea\]")]
    )
    def test_pools_of_too_few_entities_or_without_forms_are_refused(self, pools: list[str], message: str) -> None:
        forms = Forms({}, {"bird": {"any": {"train": ["{m}"]}}}, {})
        listed = [entity(str(number), f"B{number}", "bird", pool=pool) for number, pool in enumerate(pools)]
        with pytest.raises(SampleError, match=message):
            sample_text.check_pools(listed, forms)

    def test_no_form_names_an_entity(self, entities: list[Entity], forms: Forms) -> None:
        names: dict[str, set[str]] = defaultdict(set)
        for entity in entities:
            names[entity.category].add(entity.name.lower())
            names["neutral"].add(entity.name.lower())
        pools = {category: list(named.values()) for category, named in forms.pools.items()}
        for category, listed in {**pools, "neutral": [forms.neutral]}.items():
            for form in (form for pool in listed for split in pool.values() for form in split):
                fillers = [
                    f for slot in re.findall(r"\{(\w+)\}", form) for f in forms.slots[category].get(slot.lower(), [])
                ]
                for text in (form, *fillers):
                    assert not names[category] & set(re.findall(r"[a-z]+", text.lower())), (form, text)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("emoji:1\tName\tbird\tcount\t\tname\t\t", "line 2"),
            ("emoji:1\tName\tbird\tcount\t\tname\t\t\tText.\tmore", "line 2"),
            ("emoji:1\tName\tbird\tdual\t\tname\t\t\tText.", "dual"),
            ("emoji:1\tName\tbird\tcount\t\tname\t\tnames:dual\tText.", "dual"),
            ("emoji:1\tName\tbird\tcount\t\tname\t\t\tText.\nemoji:1\tB\tbird\tcount\t\tb\t\t\tT.", "emoji:1"),
        ],
    )
    def test_a_faulty_list_is_refused(self, tmp_path: Path, row: str, message: str) -> None:
        path = tmp_path / "entities.tsv"
        header = "id\tname\tcategory\tnoun\tpools\tsource_name\tdrawings\taliases\tdescription"
        path.write_text(f"{header}\n{row}\n", encoding="utf-8")
        with pytest.raises(SampleError, match=message):
            sample_entities.read_entities(path)

    def test_names_pools_and_nouns_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "entities.tsv"
        header = "id\tname\tcategory\tnoun\tpools\tsource_name\tdrawings\taliases\tdescription"
        rows = [
            "1\tRook\tbird\tcount\t\trook\t\trooks:plural; black rook\tA.",
            "2\tKwaggle\tbird\tproper\twild any\tk\t\t\tB.",
        ]
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        rook, kwaggle = sample_entities.read_entities(path)
        assert (rook.noun, rook.pools) == ("count", ["any"])
        assert rook.aliases == [Name("rooks", "plural"), Name("black rook", "count")]
        assert (kwaggle.noun, kwaggle.pools, kwaggle.aliases) == ("proper", ["wild", "any"], [])

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('test = ["c {M}"]', 'test = ["a {M}"]', "listed under"),
            ('test = ["C {M}"]', 'test = ["C"]', "needs one"),
            ('test = ["C {M}"]', 'test = ["C {M} {nobody}"]', "no slots but"),
            ('test = ["C {M}"]', 'test = ["C {the} {M}"]', "no slots but"),
            ('test = ["C {M}"]', 'test = ["C  {M}"]', "a space too many"),
            ('test = ["C {M}"]', 'test = ["C {M"]', "needs one"),
            ('test = ["C {M}"]', 'test = ["C {M}}"]', "a brace"),
            ('test = ["C {M}"]', 'test = ["c {M}"]', "small letter"),
            ('test = ["C {M}"]', "test = []", "needs forms for each"),
            ('train = ["{The} {m} sang."]', "", "category.bird|bird.any"),
        ],
    )
    def test_faulty_forms_are_refused(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        path = tmp_path / "texts.toml"
        text = """
        [slots]
        person = ["Maria"]
        [neutral]
        train = ["A {M}"]
        validation = ["B {M}"]
        test = ["C {M}"]
        [category.bird.slots]
        tree = ["oak"]
        [category.bird.any]
        train = ["{The} {m} sang."]
        validation = ["{The} {m} flew to {some} {tree}."]
        test = ["{Person} saw {a} {m}"]
        """
        path.write_text(text, encoding="utf-8")
        forms = sample_text.read_forms(path)
        assert forms.neutral["test"] == ["C {M}"]
        assert forms.slots == {"neutral": {"person": ["Maria"]}, "bird": {"person": ["Maria"], "tree": ["oak"]}}
        old = old.replace("c {M}", "C {M}")
        assert old in text
        path.write_text(text.replace(old, new.replace('"a {M}"', '"A {M}"')), encoding="utf-8")
        with pytest.raises(SampleError, match=message):
            sample_text.read_forms(path)


def entity(
    id: str, name: str, category: str, noun: str = "count", aliases: tuple[Name, ...] = (), pool: str = "any"
) -> Entity:
    return Entity(id, name, category, noun, [pool], name.lower(), [], list(aliases), f"A {category}.")


class TestTexts:
    SLOTS: ClassVar = {"person": ["Ann", "Bob"], "time": ["today"]}
    KIWI, BOOTS, SALT = Name("kiwi", "count"), Name("boots", "plural"), Name("salt", "mass")
    EMIRATES, KENYA = Name("Emirates", "proper-the"), Name("Kenya", "proper")
    TESLA, RED = Name("Tesla", "proper-count"), Name("red", "bare")

    def compose(self, form: str, name: Name) -> Text:
        return sample_text.compose(form, name, self.SLOTS, np.random.default_rng(1))

    @pytest.mark.parametrize(
        ("form", "name", "expected"),
        [
            ("{The} {m} sang.", KIWI, "The kiwi sang."),
            ("{The} {m} fit{s}.", BOOTS, "The boots fit."),
            ("{The} {m} fit{s}.", KIWI, "The kiwi fits."),
            ("{The} {m} voted.", KENYA, "Kenya voted."),
            ("{The} {m} voted.", EMIRATES, "The Emirates voted."),
            ("People in {the} {m} voted.", EMIRATES, "People in the Emirates voted."),
            ("{A} {m} and {some} {time}.", Name("owl", "count"), "An owl and a today."),
            ("{Some} {m}, please.", SALT, "Some salt, please."),
            ("{Some} {m}, please.", BOOTS, "Some boots, please."),
            ("{Some} {m}, please.", KIWI, "A kiwi, please."),
            # An article that falls away hands its capital on, and takes its space with it.
            ("{A} ripe {m}.", BOOTS, "Ripe boots."),
            ("{The} {m}.", RED, "Red."),
            ("{A} {m}!", TESLA, "A Tesla!"),
            # It looks at the word after it, not at the mention.
            ("{A} {m}.", Name("orange", "count"), "An orange."),
            ("{A} ripe {m}.", Name("orange", "count"), "A ripe orange."),
            ("Saw {a} odd {m}.", KIWI, "Saw an odd kiwi."),
            ("{A} {m}.", Name("unicorn", "count"), "A unicorn."),
            ("{A} {m}.", Name("umbrella", "count"), "An umbrella."),
            ("{An} {m} flight.", EMIRATES, "An Emirates flight."),
            ("{An} {m} flight.", KENYA, "A Kenya flight."),
            ("{This} {m} {is} good, {it} {has} seeds, I like {them} and {its} peel.", KIWI,
             "This kiwi is good, it has seeds, I like it and its peel."),
            ("{This} {m} {was} good, {does} {it} fit?", BOOTS, "These boots were good, do they fit?"),
            # A chat message has no capital at all.
            ("{person} saw {the} {m}, i think", KENYA, "ann saw kenya, i think|bob saw kenya, i think"),
            ("Slide: {M}", KIWI, "Slide: Kiwi"),
            ("{M}, {time}", Name("boAt", "proper"), "boAt, today"),
        ],
    )  # fmt: skip
    def test_grammar(self, form: str, name: Name, expected: str) -> None:
        text = self.compose(form, name)
        assert text.text in expected.split("|")
        assert text.form == form
        assert text.mention.lower() == name.text.lower()
        assert text.mention in text.text

    def test_mention_that_opens_the_text_is_returned_as_written(self) -> None:
        text = self.compose("{A} {m} came up", self.SALT)
        assert (text.text, text.mention) == ("Salt came up", "Salt")

    def test_the_mention_is_found_where_its_name_stands_twice(self) -> None:
        text = self.compose("saw a kiwibird and {a} {m}", Name("Kiwi", "proper"))
        assert (text.text, text.mention) == ("saw a kiwibird and kiwi", "kiwi")

    def test_one_person_is_not_named_twice(self) -> None:
        for seed in range(20):
            text = sample_text.compose(
                "{Person} said {person} saw {m}.", self.KENYA, self.SLOTS, np.random.default_rng(seed)
            )
            assert text.text in {"Ann said Bob saw Kenya.", "Bob said Ann saw Kenya."}

    def test_same_state_same_text(self) -> None:
        assert self.compose("{Person} saw {m}", self.KENYA) == self.compose("{Person} saw {m}", self.KENYA)

    def test_who_is_eligible(self) -> None:
        company, fruit, pear = (
            entity("a", "Orange", "company"),
            entity("b", "orange", "fruit"),
            entity("c", "Pear", "fruit"),
        )
        north, south = entity("d", "Korea", "country"), entity("e", "Korea", "country")
        everyone = [company, fruit, pear, north, south]
        assert sample_text.eligible(everyone, "text") == [company, fruit]
        assert sample_text.eligible(everyone, "image") == [company, fruit, north, south]
        assert sample_text.eligible(everyone, "both") == everyone

    def test_aliases_are_for_both_only(self) -> None:
        bear = entity("a", "Bear", "animal", aliases=(Name("polar bears", "plural"),))
        rng = np.random.default_rng(0)
        chosen = {kind: {sample_text.choose_name(bear, kind, rng) for _ in range(200)} for kind in sample_text.KINDS}
        own = Name("bear", "count")
        assert chosen == {"text": {own}, "image": {own}, "both": {own, Name("polar bears", "plural")}}

    def test_an_entity_has_each_of_its_forms_before_any_twice(self) -> None:
        pools = {"bird": {"any": {"train": ["a {m}", "b {m}"]}, "wild": {"train": ["c {m}"]}}}
        chooser = sample_text.FormChooser(Forms({"train": ["n {m}"]}, pools, {}), "train", np.random.default_rng(0))
        rook = entity("a", "Rook", "bird")
        rook.pools = ["any", "wild"]
        owl = entity("b", "Owl", "bird")
        for _ in range(5):
            assert sorted(chooser.choose(rook, "text") for _ in range(3)) == ["a {m}", "b {m}", "c {m}"]
            assert sorted(chooser.choose(owl, "both") for _ in range(2)) == ["a {m}", "b {m}"]
        assert chooser.choose(owl, "image") == "n {m}"


class TestImages:
    def test_background_and_camera_are_repeatable(self) -> None:
        first, again, other = (
            sample_images.photograph(None, build_sample.stable_rng("seed", number)) for number in (1, 1, 2)
        )
        assert first.size == (64, 64)
        assert first.mode == "RGB"
        assert first.tobytes() == again.tobytes() != other.tobytes()

    def test_homography_takes_corners_to_corners(self) -> None:
        source = [(0, 0), (30, 0), (30, 20), (0, 20)]
        target = [(3, 1), (40, 6), (36, 30), (1, 25)]
        a, b, c, d, e, f, g, h = sample_images.homography(source, target)
        for (x, y), expected in zip(target, source, strict=True):
            scale = g * x + h * y + 1
            assert ((a * x + b * y + c) / scale, (d * x + e * y + f) / scale) == pytest.approx(expected)

    def test_place_keeps_most_of_the_drawing(self) -> None:
        drawing = PIL.new("RGBA", (40, 40), (200, 0, 0, 255))
        shares = []
        for seed in range(30):
            layer = sample_images.place(drawing, np.random.default_rng(seed), 128)
            assert layer.size == (128, 128)
            shares.append(np.asarray(layer.getchannel("A")).mean() / 255)
        # The side is at least 0.72 of the frame, a corner moves by at most a tenth of it, a twentieth is cut off.
        assert min(shares) > 0.3
        assert len(set(shares)) == 30

    def test_render_trims_and_keeps_colors(self) -> None:
        pytest.importorskip("resvg_py")
        image = sample_images.render(Drawing("test", RING.replace('viewBox="0 0 20 10"', 'viewBox="-20 -20 60 60"')))
        assert image.mode == "RGBA"
        assert image.width == pytest.approx(2 * image.height, abs=2)
        assert image.getpixel((image.width - 8, image.height // 2)) == (204, 0, 0, 255)
        assert image.getpixel((image.width // 4, image.height // 2)) == (255, 255, 0, 255)

    def test_one_color_drawing_takes_its_ink(self) -> None:
        pytest.importorskip("resvg_py")
        svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><path d="M0 0h10v10H0z"/></svg>'
        logo = Drawing("test", svg, ink=(0, 128, 0))
        assert sample_images.render(logo).getpixel((5, 5)) == (0, 128, 0, 255)
        assert sample_images.render(logo, (255, 255, 255)).getpixel((5, 5)) == (255, 255, 255, 255)

    def test_empty_drawing_is_refused(self) -> None:
        pytest.importorskip("resvg_py")
        with pytest.raises(SampleError, match="empty"):
            sample_images.render(Drawing("some-package", '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>'))

    def test_photograph_and_catalogue_image_show_the_drawing(self) -> None:
        pytest.importorskip("resvg_py")
        drawing = Drawing("test", RING)
        plain = np.asarray(sample_images.catalogue_image(drawing), dtype=int)
        assert plain.shape == (64, 64, 3)
        assert tuple(plain[1, 1]) == (246, 246, 246)
        assert np.abs(plain[32, 48] - (204, 0, 0)).max() < 10
        red = []
        for seed in range(10):
            photo = np.asarray(sample_images.photograph(drawing, np.random.default_rng(seed)), dtype=int)
            red.append(((photo[..., 0] > 90) & (photo[..., 0] > 2 * photo[..., 1]) & (photo[..., 2] < 100)).mean())
        assert np.median(red) > 0.1


def archive(path: Path, files: dict[str, object]) -> str:
    with tarfile.open(path, "w:gz") as file:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small archive in place of each package."""

    def icons(*names: str, **more: object) -> dict[str, object]:
        body = '<rect width="8" height="8" fill="#c00"/>'
        return {"icons": {name: {"body": body} for name in names}, "width": 8, "height": 8, **more}

    emoji = {"icons.json": icons("kiwi-fruit"), "chars.json": {"1f95d": "kiwi-fruit"}}
    flags = {"icons.json": icons("flag-georgia"), "chars.json": {"1f1ec-1f1ea": "flag-georgia"}}
    content: dict[str, dict[str, object]] = {
        "@iconify-json/noto": emoji,
        "@iconify-json/fluent-emoji-flat": {"icons.json": icons(), "chars.json": {}},
        "@iconify-json/twemoji": flags,
        "@iconify-json/circle-flags": {"icons.json": icons("us-ga", "old", aliases={"ge": {"parent": "old"}})},
        "@iconify-json/logos": {"icons.json": icons("grape", "spring-icon")},
        "@iconify-json/devicon": {"icons.json": icons("spring")},
        "@iconify-json/game-icons": {"icons.json": icons("kiwi-bird")},
        "flag-icons": {"country.json": [{"code": "ge", "name": "Georgia"}], "flags/4x3/ge.svg": RING},
        "simple-icons": {
            "data/simple-icons.json": [
                {"title": "Spring", "hex": "6DB33F"},
                {"title": "Owned", "hex": "000000", "license": {"type": "custom"}},
            ],
            "icons/spring.svg": RING,
            "icons/owned.svg": RING,
        },
        "unicode-emoji-json": {"data-by-emoji.json": {"🥝": {"name": "kiwi fruit"}}},
        "cldr-subdivisions-full": {
            "subdivisions/en/en.json": {
                "subdivisions": {"localeDisplayNames": {"subdivisions": {"usga": "Georgia"}}},
            }
        },
    }
    made = {}
    for name, published in sample_entities.PACKAGES.items():
        path = tmp_path / published.filename
        digest = archive(path, {"package.json": {"license": published.license}, **content[name]})
        made[name] = Package(name, published.version, digest, published.license, published.role, published.project)
    monkeypatch.setattr(sample_entities, "PACKAGES", made)
    return tmp_path


def listed(id: str, drawings: str = "", source_name: str = "") -> Entity:
    return Entity(id, "Name", "bird", "count", ["any"], source_name, drawings.split(), [], "Text.")


class TestPackages:
    @pytest.mark.parametrize(
        ("id", "drawings", "name", "found"),
        [
            ("emoji:1f95d", "", "kiwi fruit", ["@iconify-json/noto"]),
            ("flag:ge", "", "Georgia", ["flag-icons", "@iconify-json/twemoji", "@iconify-json/circle-flags"]),
            ("flag:us-ga", "", "Georgia", ["@iconify-json/circle-flags"]),
            ("pictogram:kiwi-bird", "", "kiwi bird", ["@iconify-json/game-icons"]),
            ("brand:grape", "logos:grape", "grape", ["@iconify-json/logos"]),
            (
                "brand:spring",
                "logos:spring-icon devicon:spring",
                "Spring",
                ["simple-icons", "@iconify-json/logos", "@iconify-json/devicon"],
            ),
        ],
    )
    def test_finds(self, packages: Path, id: str, drawings: str, name: str, found: list[str]) -> None:
        store = PackageStore(packages)
        got_name, got = sample_entities.find_drawings(listed(id, drawings), store)
        assert (got_name, [drawing.package for drawing in got]) == (name, found)
        assert [drawing.ink for drawing in got if drawing.package == "simple-icons"] in ([], [(0x6D, 0xB3, 0x3F)])

    @pytest.mark.parametrize(
        ("id", "drawings", "message"),
        [
            ("emoji:1f34a", "", "no such identifier"),
            ("flag:zz", "", "no such identifier"),
            ("flag:../x", "", "no such identifier"),
            ("pictogram:crow", "", "no such identifier"),
            ("brand:grape", "", "no such identifier"),
            ("brand:wine", "logos:grape", "no such identifier"),
            ("planet:mars", "", "no such identifier"),
            ("brand:spring", "logos:summer", "logos:summer"),
            ("brand:spring", "emoji:spring", "emoji:spring"),
            ("brand:owned", "", "custom"),
        ],
    )
    def test_what_the_packages_do_not_know_is_refused(
        self, packages: Path, id: str, drawings: str, message: str
    ) -> None:
        with pytest.raises(SampleError, match=message):
            sample_entities.find_drawings(listed(id, drawings), PackageStore(packages))

    def test_another_name_in_the_source_is_refused(self, packages: Path) -> None:
        store = PackageStore(packages)
        sample_entities.add_drawings([listed("emoji:1f95d", source_name="kiwi fruit")], store)
        with pytest.raises(SampleError, match="'kiwi fruit' in its source, and 'kiwi bird'"):
            sample_entities.add_drawings([listed("emoji:1f95d", source_name="kiwi bird")], store)

    def test_missing_packages_are_named(self, packages: Path) -> None:
        (packages / sample_entities.PACKAGES["flag-icons"].filename).unlink()
        with pytest.raises(SampleError, match=r"1 of 11 packages.*npm pack flag-icons@7"):
            PackageStore(packages)

    def test_altered_package_is_refused(self, packages: Path) -> None:
        path = packages / sample_entities.PACKAGES["flag-icons"].filename
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(SampleError, match="as it was published"):
            PackageStore(packages)

    def test_another_license_is_refused(self, packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = sample_entities.PACKAGES["flag-icons"]
        changed = Package(old.name, old.version, old.sha256, "GPL-3.0", old.role, old.project)
        monkeypatch.setitem(sample_entities.PACKAGES, "flag-icons", changed)
        with pytest.raises(SampleError, match="is under MIT, not under GPL"):
            PackageStore(packages)

    def test_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert build_sample.main(["--list_packages"]) == 0
        assert "simple-icons@" in capsys.readouterr().out
        assert build_sample.main(["--packages_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 1
        assert "npm pack" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        with pytest.raises(SystemExit):
            build_sample.main([])

    def test_rebuild_gives_the_shipped_files(self, tmp_path: Path) -> None:
        folder = os.environ.get("MIMIC_SAMPLE_PACKAGES")
        if folder is None:
            pytest.skip("MIMIC_SAMPLE_PACKAGES does not name a folder with the packages")
        pytest.importorskip("resvg_py")
        build_sample.build(folder, tmp_path)
        for path in sorted(SAMPLE.rglob("*.parquet")):
            assert (tmp_path / path.relative_to(SAMPLE)).read_bytes() == path.read_bytes(), path
