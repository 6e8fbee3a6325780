"""The sample data set as it is shipped, and the parts of the program that built it."""

import hashlib
import io
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

from mimic_el.datasets_scripts import build_sample
from mimic_el.datasets_scripts.build_sample import Drawing, Entity, Package, PackageStore, SampleError

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
    return build_sample.read_entities()


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
            assert set(counts) == {"words", "picture", "both"}
            assert len(set(counts.values())) == 1

    def test_words_and_pictures_decide_between_entities_of_one_name(self, mentions: DatasetDict, kb: Dataset) -> None:
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
                if row["kind"] == "words":
                    assert categories[row["answer"]] not in {categories[id] for id in others}

    def test_pictures_are_where_the_kind_says(self, mentions: DatasetDict) -> None:
        for split in mentions.values():
            for row in split:
                assert (row["drawing"] is None) == (row["kind"] == "words")
                assert row["image"] is not None or row["kind"] == "words"
            shown = [row["image"] is not None for row in split if row["kind"] == "words"]
            assert 0.35 < np.mean(shown) < 0.65

    def test_sentences_contain_their_mention(self, mentions: DatasetDict) -> None:
        for split in mentions.values():
            assert all(row["mention"] in row["sentence"] for row in split)

    def test_sentences_follow_their_form(self, mentions: DatasetDict) -> None:
        fillers = {"m": ".+", "the": "(the )?", "person": ".+", "time": ".+"}
        for split in mentions.values():
            for row in split:
                parts = re.split(r"\{(\w+)\}", row["form"])
                pattern = "".join(fillers[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))
                assert re.fullmatch(f"{pattern}\\.", row["sentence"], re.IGNORECASE), row

    def test_splits_share_no_sentence_form(self, mentions: DatasetDict) -> None:
        forms = build_sample.read_forms()
        clauses = {
            split: {clause for pool in (forms.neutral, *forms.clauses.values()) for clause in pool[split]}
            for split in mentions
        }
        for split, rows in mentions.items():
            others = set().union(*(clauses[name] for name in mentions if name != split))
            for form in set(rows["form"]):
                # A frame and a clause of this split make the form up, and no clause of another split is in it.
                assert any(form == frame.replace("{s}", c) for frame in forms.frames[split] for c in clauses[split])
                assert not any(clause in form for clause in others), form
        assert not set(mentions["train"]["form"]) & set(mentions["test"]["form"])

    def test_splits_share_no_picture(self, mentions: DatasetDict, kb: Dataset) -> None:
        seen = {hashlib.sha256(image["bytes"]).hexdigest() for images in kb["images"] for image in images}
        for split in mentions.values():
            pictures = digests(split)
            assert len(pictures) == len(set(pictures))
            assert not seen & set(pictures)
            seen |= set(pictures)

    def test_pictures_are_small_rgb_squares(self, mentions: DatasetDict, kb: Dataset) -> None:
        pictures = [image for images in kb["images"] for image in images]
        pictures += [image for image in mentions["test"]["image"] if image is not None]
        for picture in pictures:
            with PIL.open(io.BytesIO(picture["bytes"])) as file:
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
        assert all(1 <= len(images) <= build_sample.KB_PICTURES for images in kb["images"])
        packages = {name.removeprefix("@iconify-json/") for name in build_sample.PACKAGES}
        for images in kb["images"]:
            # A picture's name tells whose drawing it is, and no two are by the same hand.
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
            assert f"| {name} | {len(split):,} | {kinds['words']:,} | {kinds['picture']:,} |" in card.text
        assert f"The knowledge base has {len(kb):,} entities" in card.text
        for package in build_sample.PACKAGES.values():
            assert f"| {package.name} | {package.version} | {package.licence} |" in card.text
        used = {drawing for split in mentions.values() for drawing in split["drawing"]} - {None}
        assert used <= {name.removeprefix("@iconify-json/") for name in build_sample.PACKAGES}


class TestInputs:
    def test_every_category_has_forms_and_several_entities(self, entities: list[Entity]) -> None:
        counts = Counter(entity.category for entity in entities)
        assert set(counts) == set(build_sample.read_forms().clauses)
        # A clause shared by a few entities at least gives none of them away.
        assert min(counts.values()) >= 4

    def test_no_clause_names_an_entity(self, entities: list[Entity]) -> None:
        forms = build_sample.read_forms()
        names: dict[str, set[str]] = defaultdict(set)
        for entity in entities:
            names[entity.category].add(entity.name.lower())
        for category, by_split in forms.clauses.items():
            for clause in (clause for clauses in by_split.values() for clause in clauses):
                assert not names[category] & set(re.findall(r"[a-z]+", clause.lower())), clause

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("emoji:1\tName\tbird\tcommon\tname\t\t", "line 2"),
            ("emoji:1\tName\tbird\tcommon\tname\t\t\tText.\tmore", "line 2"),
            ("emoji:1\tName\tbird\tplural\tname\t\t\tText.", "plural"),
            ("emoji:1\tName\tbird\tcommon\tname\t\t\tText.\nemoji:1\tB\tbird\tcommon\tb\t\t\tT.", "emoji:1"),
        ],
    )
    def test_a_faulty_list_is_refused(self, tmp_path: Path, row: str, message: str) -> None:
        path = tmp_path / "entities.tsv"
        header = "id\tname\tcategory\tnoun\tsource_name\tdrawings\taliases\tdescription"
        path.write_text(f"{header}\n{row}\n", encoding="utf-8")
        with pytest.raises(SampleError, match=message):
            build_sample.read_entities(path)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('test = ["c {m}"]', 'test = ["a {m}"]', "listed under"),
            ('test = ["c {m}"]', 'test = ["c"]', "needs one"),
            ('test = ["c {m}"]', 'test = ["c {m} {nobody}"]', "no slots but"),
            ('test = ["c {m}"]', "test = []", "no form for test"),
        ],
    )
    def test_faulty_forms_are_refused(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        path = tmp_path / "sentences.toml"
        text = """
        [slots]
        person = ["Maria"]
        [frames]
        train = ["{s}"]
        validation = ["so {s}"]
        test = ["thus {s}"]
        [neutral]
        train = ["a {m}"]
        validation = ["b {m}"]
        test = ["c {m}"]
        [category.bird]
        train = ["{the}{m} sang"]
        validation = ["{the}{m} flew"]
        test = ["{person} saw {the}{m}"]
        """
        path.write_text(text, encoding="utf-8")
        assert build_sample.read_forms(path).neutral["test"] == ["c {m}"]
        path.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(SampleError, match=message):
            build_sample.read_forms(path)


def entity(id: str, name: str, category: str, aliases: tuple[str, ...] = ()) -> Entity:
    return Entity(id, name, category, False, name.lower(), [], list(aliases), f"A {category}.")


class TestSentences:
    SLOTS: ClassVar = {"person": ["Ann", "Bob"], "time": ["today"]}

    def compose(self, frame: str, clause: str, surface: str, article: bool = True) -> build_sample.Sentence:
        return build_sample.compose(frame, clause, surface, article, self.SLOTS, np.random.default_rng(1))

    def test_article_and_capital(self) -> None:
        text = self.compose("{s}", "{the}{m} sang", "kiwi")
        assert (text.sentence, text.mention, text.form) == ("The kiwi sang.", "kiwi", "{the}{m} sang")
        text = self.compose("{time} {s}", "{the}{m} sang", "Georgia", article=False)
        assert text.sentence == "Today Georgia sang."

    def test_mention_that_opens_the_sentence_is_returned_as_written(self) -> None:
        text = self.compose("{s}", "{m} came up", "kiwi")
        assert (text.sentence, text.mention) == ("Kiwi came up.", "Kiwi")

    def test_one_person_is_not_named_twice(self) -> None:
        for seed in range(20):
            rng = np.random.default_rng(seed)
            text = build_sample.compose("{person} said {s}", "{person} saw {m}", "it", False, self.SLOTS, rng)
            assert text.sentence in {"Ann said Bob saw it.", "Bob said Ann saw it."}

    def test_same_state_same_sentence(self) -> None:
        assert self.compose("{person} and {s}", "{person} saw {m}", "it") == self.compose(
            "{person} and {s}", "{person} saw {m}", "it"
        )

    def test_who_is_eligible(self) -> None:
        company, fruit, pear = (
            entity("a", "Orange", "company"),
            entity("b", "orange", "fruit"),
            entity("c", "Pear", "fruit"),
        )
        north, south = entity("d", "Korea", "country"), entity("e", "Korea", "country")
        everyone = [company, fruit, pear, north, south]
        assert build_sample.eligible(everyone, "words") == [company, fruit]
        assert build_sample.eligible(everyone, "picture") == [company, fruit, north, south]
        assert build_sample.eligible(everyone, "both") == everyone

    def test_aliases_are_for_both_only(self) -> None:
        bear = entity("a", "Bear", "animal", aliases=("polar bear",))
        rng = np.random.default_rng(0)
        written = {
            kind: {build_sample.surface_form(bear, kind, rng) for _ in range(200)} for kind in build_sample.KINDS
        }
        assert written == {
            "words": {"Bear", "bear"},
            "picture": {"Bear", "bear"},
            "both": {"Bear", "bear", "polar bear"},
        }


class TestPictures:
    def test_background_and_camera_are_repeatable(self) -> None:
        first, again, other = (
            build_sample.photograph(None, build_sample.stable_rng("seed", number)) for number in (1, 1, 2)
        )
        assert first.size == (64, 64)
        assert first.mode == "RGB"
        assert first.tobytes() == again.tobytes() != other.tobytes()

    def test_homography_takes_corners_to_corners(self) -> None:
        source = [(0, 0), (30, 0), (30, 20), (0, 20)]
        target = [(3, 1), (40, 6), (36, 30), (1, 25)]
        a, b, c, d, e, f, g, h = build_sample.homography(source, target)
        for (x, y), expected in zip(target, source, strict=True):
            scale = g * x + h * y + 1
            assert ((a * x + b * y + c) / scale, (d * x + e * y + f) / scale) == pytest.approx(expected)

    def test_place_keeps_most_of_the_drawing(self) -> None:
        drawing = PIL.new("RGBA", (40, 40), (200, 0, 0, 255))
        shares = []
        for seed in range(30):
            layer = build_sample.place(drawing, np.random.default_rng(seed), 128)
            assert layer.size == (128, 128)
            shares.append(np.asarray(layer.getchannel("A")).mean() / 255)
        # The side is at least 0.72 of the frame, a corner moves by at most a tenth of it, a twentieth is cut off.
        assert min(shares) > 0.3
        assert len(set(shares)) == 30

    def test_render_trims_and_keeps_colours(self) -> None:
        pytest.importorskip("resvg_py")
        picture = build_sample.render(Drawing("test", RING.replace('viewBox="0 0 20 10"', 'viewBox="-20 -20 60 60"')))
        assert picture.mode == "RGBA"
        assert picture.width == pytest.approx(2 * picture.height, abs=2)
        assert picture.getpixel((picture.width - 8, picture.height // 2)) == (204, 0, 0, 255)
        assert picture.getpixel((picture.width // 4, picture.height // 2)) == (255, 255, 0, 255)

    def test_one_colour_drawing_takes_its_ink(self) -> None:
        pytest.importorskip("resvg_py")
        svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><path d="M0 0h10v10H0z"/></svg>'
        logo = Drawing("test", svg, ink=(0, 128, 0))
        assert build_sample.render(logo).getpixel((5, 5)) == (0, 128, 0, 255)
        assert build_sample.render(logo, (255, 255, 255)).getpixel((5, 5)) == (255, 255, 255, 255)

    def test_empty_drawing_is_refused(self) -> None:
        pytest.importorskip("resvg_py")
        with pytest.raises(SampleError, match="empty"):
            build_sample.render(Drawing("some-package", '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>'))

    def test_photograph_and_catalogue_picture_show_the_drawing(self) -> None:
        pytest.importorskip("resvg_py")
        drawing = Drawing("test", RING)
        plain = np.asarray(build_sample.catalogue_picture(drawing), dtype=int)
        assert plain.shape == (64, 64, 3)
        assert tuple(plain[1, 1]) == (246, 246, 246)
        assert np.abs(plain[32, 48] - (204, 0, 0)).max() < 10
        red = []
        for seed in range(10):
            photo = np.asarray(build_sample.photograph(drawing, np.random.default_rng(seed)), dtype=int)
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
    for name, published in build_sample.PACKAGES.items():
        path = tmp_path / published.filename
        digest = archive(path, {"package.json": {"license": published.licence}, **content[name]})
        made[name] = Package(name, published.version, digest, published.licence, published.role, published.project)
    monkeypatch.setattr(build_sample, "PACKAGES", made)
    return tmp_path


def listed(id: str, drawings: str = "", source_name: str = "") -> Entity:
    return Entity(id, "Name", "bird", False, source_name, drawings.split(), [], "Text.")


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
        got_name, got = build_sample.find_drawings(listed(id, drawings), store)
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
            build_sample.find_drawings(listed(id, drawings), PackageStore(packages))

    def test_another_name_in_the_source_is_refused(self, packages: Path) -> None:
        store = PackageStore(packages)
        build_sample.add_drawings([listed("emoji:1f95d", source_name="kiwi fruit")], store)
        with pytest.raises(SampleError, match="'kiwi fruit' in its source, and 'kiwi bird'"):
            build_sample.add_drawings([listed("emoji:1f95d", source_name="kiwi bird")], store)

    def test_missing_packages_are_named(self, packages: Path) -> None:
        (packages / build_sample.PACKAGES["flag-icons"].filename).unlink()
        with pytest.raises(SampleError, match=r"1 of 11 packages.*npm pack flag-icons@7"):
            PackageStore(packages)

    def test_altered_package_is_refused(self, packages: Path) -> None:
        path = packages / build_sample.PACKAGES["flag-icons"].filename
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(SampleError, match="as it was published"):
            PackageStore(packages)

    def test_another_licence_is_refused(self, packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = build_sample.PACKAGES["flag-icons"]
        changed = Package(old.name, old.version, old.sha256, "GPL-3.0", old.role, old.project)
        monkeypatch.setitem(build_sample.PACKAGES, "flag-icons", changed)
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
