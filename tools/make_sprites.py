"""Packs the sprites that the composed scenes are made of into `jaxmllm/assets/sprites.zip`.

Run once by hand; the result is committed. The inputs are two npm packages, fetched beforehand:

    npm pack @lobehub/fluent-emoji-3d@1.1.0
    npm pack emojibase-data@17.0.0
    python tools/make_sprites.py lobehub-fluent-emoji-3d-1.1.0.tgz emojibase-data-17.0.0.tgz

The zip is not compressed (deflating WebP gains nothing). It holds `<hexcode>.webp`, 96 x 96 RGBA, and `names.json`, a
list of {"noun", "plural", "hexcode", "subgroup"}. A question such as "How many ducks are there?" needs countable nouns
that each name one thing, so masses, pairs and second pictures of a concept are left out.
"""

import argparse
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

SIDE = 96  # pixels
QUALITY = 85
SHA256 = {"pictures": "c1bb7eee7de09020", "names": "d01d0e2ca4e22cb4"}  # first 16 hex digits
OUTPUT = Path(__file__).resolve().parent.parent / "jaxmllm" / "assets" / "sprites.zip"


def _lines(text: str) -> list[str]:
    return [part.strip() for line in text.strip().splitlines() for part in line.split(";") if part.strip()]


SUBGROUPS = _lines("""
    animal-mammal; animal-bird; animal-amphibian; animal-reptile; animal-marine; animal-bug
    plant-flower; plant-other; food-fruit; food-vegetable; food-prepared; food-asian; food-sweet; drink
    dishware; transport-ground; transport-water; transport-air; hotel; time; sky-weather; event
    award-medal; sport; game; arts-crafts; clothing; sound; musical-instrument; phone; computer
    light-video; book-paper; money; mail; writing; office; lock; tool; science; medical; household
""")

# Labels that are long or say how the thing is drawn, and the word that people use for the thing.
RENAMED = _lines("""
    dog face = dog; cat face = cat; monkey face = monkey; tiger face = tiger; horse face = horse
    cow face = cow; pig face = pig; mouse face = mouse; rabbit face = rabbit; honeybee = bee
    lady beetle = ladybug; T-Rex = dinosaur; hatching chick = chick; spouting whale = whale; necktie = shirt
    blowfish = pufferfish; spiral shell = seashell; evergreen tree = pine tree; deciduous tree = tree
    sheaf of rice = rice plant; seedling = sprout; four leaf clover = clover; red apple = apple
    tangerine = orange; kiwi fruit = kiwi; baguette bread = baguette; meat on bone = meat bone
    cut of meat = steak; stuffed flatbread = pita; pot of food = stew pot; bowl with spoon = soup bowl
    canned food = tin can; bento box = lunch box; birthday cake = cake; fish cake with swirl = fish cake
    soft ice cream = ice cream cone; shortcake = slice of cake; hot beverage = cup
    bottle with popping cork = champagne bottle; cocktail glass = martini; tropical drink = cocktail
    cup with straw = soda cup; beverage box = juice box; kitchen knife = knife; high-speed train = train
    railway car = wagon; automobile = car; delivery truck = truck; motor scooter = scooter
    manual wheelchair = wheelchair; auto rickshaw = rickshaw; vertical traffic light = traffic light
    police car light = siren; ring buoy = lifebuoy; flying saucer = UFO; luggage = suitcase
    hourglass done = hourglass; mantelpiece clock = mantel clock; ringed planet = planet
    snowman without snow = snowman; jack-o-lantern = pumpkin; wrapped gift = gift
    carp streamer = fish kite; 1st place medal = medal; american football = football
    flag in hole = golf hole; martial arts uniform = karate uniform; flying disc = frisbee
    pool 8 ball = billiard ball; game die = die; video game = game controller; bullseye = dartboard
    artist palette = palette; sewing needle = needle; chess pawn = pawn; one-piece swimsuit = swimsuit
    folding hand fan = hand fan; woman’s clothes = blouse; running shoe = sneaker
    high-heeled shoe = high heel; woman’s sandal = sandal; thong sandal = flip-flop; woman’s boot = boot
    woman’s hat = sun hat; billed cap = cap; rescue worker’s helmet = rescue helmet; gem stone = gem
    musical keyboard = piano; long drum = conga drum; electric plug = plug
    magnifying glass tilted left = magnifying glass; red paper lantern = lantern; closed book = book
    framed picture = painting; dollar banknote = banknote; closed mailbox with raised flag = mailbox
    tear-off calendar = calendar; chart increasing = chart; straight ruler = ruler
    triangular ruler = set square; locked = padlock; carpentry saw = saw; bow and arrow = bow
    white cane = cane; balance scale = scale; satellite antenna = satellite dish
    adhesive bandage = bandage; roll of paper = paper roll; lotion bottle = bottle
    bellhop bell = desk bell; package = parcel; dragon face = dragon
""")
NOUN_OF = dict(pair.split(" = ") for pair in RENAMED)

# Labels of second pictures of a concept that is in the pack already, or of pictures hard to tell from one in it.
SAME = _lines("""
    dog; guide dog; service dog; poodle; cat; black cat; tiger; horse; monkey; orangutan; ox
    water buffalo; cow; pig; boar; two-hump camel; mouse; rat; rabbit; polar bear; ewe; bison; moose
    donkey; leopard; mammoth; wolf; baby chick; front-facing baby chick; chicken; black bird; bird; goose
    whale; tropical fish; squid; dragon; cherry blossom; white flower; blossom; hibiscus; wilted flower
    fallen leaf; leaf fluttering in wind; herb; shamrock; melon; green apple; mango; lemon; flatbread
    moon cake; rice cracker; cooked rice; curry rice; steaming bowl; oden; fondue; burrito; tamale
    cupcake; custard; teacup without handle; sake; tumbler glass; mate; locomotive; bullet train; train
    metro; light rail; station; tram; monorail; mountain railway; tram car; wheel; oncoming bus
    trolleybus; minibus; oncoming police car; taxi; oncoming taxi; oncoming automobile; police car
    motorized wheelchair; construction; bus stop; motorway; railway track; pickup truck
    airplane departure; airplane arrival; small airplane; suspension railway; mountain cableway
    aerial tramway; ferry; passenger ship; motor boat; canoe; hourglass not done; timer clock; watch
    stopwatch; umbrella with rain drops; umbrella on ground; closed umbrella; snowman; glowing star
    sun with face; full moon face; 2nd place medal; 3rd place medal; military medal; sports medal
    softball; rugby football; cricket game; field hockey; ice hockey; lacrosse; badminton; tennis
    slot machine; joker; flower playing cards; mahjong red dragon; clutch bag; handbag; flat shoe
    hiking boot; military helmet; speaker low volume; speaker medium volume; muted speaker
    speaker high volume; bell with slash; mobile phone with arrow; low battery; dvd; optical disk
    camera with flash; video camera; magnifying glass tilted right; green book; blue book; orange book
    notebook; ledger; rolled-up newspaper; page facing up; bookmark tabs; yen banknote; euro banknote
    pound banknote; money with wings; chart increasing with yen; e-mail; incoming envelope
    envelope with arrow; outbox tray; inbox tray; postbox; closed mailbox with lowered flag
    open mailbox with raised flag; open mailbox with lowered flag; black nib; fountain pen
    open file folder; spiral calendar; calendar; chart decreasing; bar chart; round pushpin; card index
    linked paperclips; unlocked; locked with pen; locked with key; old key; hammer and pick
    hammer and wrench; crossed swords; clinking beer mugs; clinking glasses; roasted sweet potato; lotus
    admission tickets; comet; hyacinth; articulated lorry; motorcycle; telephone receiver; computer disk
    card file box; memo; ice cream; bubble tea; racing car; sport utility vehicle; bread; poultry leg
    dango; performing arts; sari; postal horn; film frames; man’s shoe; bug; page with curl; open book
    label; notebook with decorative cover; sauropod
""")

# Masses, pairs, heaps, events and parts, for which "how many ... are there?" has no clear answer.
UNCOUNTABLE = _lines("""
    paw prints; pig nose; feather; wing; coral; microbe; nest with eggs; empty nest; bouquet; grapes
    cherries; blueberries; olive; peanuts; beans; garlic; ginger root; pea pod; pancakes; french fries
    popcorn; butter; salt; bacon; falafel; cooking; spaghetti; sushi; fried shrimp; shaved ice; candy
    pouring liquid; ice; fork and knife; fork and knife with plate; chopsticks; fog; sun behind cloud
    sun behind small cloud; sun behind large cloud; sun behind rain cloud; cloud with lightning and rain
    cloud with rain; cloud with snow; cloud with lightning; wind face; cyclone; tornado; milky way
    rainbow; fire; water wave; new moon; waxing crescent moon; first quarter moon; waxing gibbous moon
    waning gibbous moon; last quarter moon; waning crescent moon; new moon face; shooting star
    first quarter moon face; last quarter moon face; twelve o’clock; twelve-thirty; one o’clock
    one-thirty; two o’clock; two-thirty; three o’clock; three-thirty; four o’clock; four-thirty
    five o’clock; five-thirty; six o’clock; six-thirty; seven o’clock; seven-thirty; eight o’clock
    eight-thirty; nine o’clock; nine-thirty; ten o’clock; ten-thirty; eleven o’clock; eleven-thirty
    fireworks; sparkles; sparkler; tanabata tree; pine decoration; Japanese dolls; moon viewing ceremony
    red envelope; reminder ribbon; party popper; confetti ball; skis; running shirt; boxing glove; glasses
    goggles; sunglasses; jeans; gloves; socks; shorts; briefs; bikini; ballet shoes; prayer beads
    shopping bags; thread; yarn; knot; maracas; books; receipt; money bag; scissors; link; chains; bubbles
    soap; safety pin; dna; drop of blood; x-ray; couch and lamp; shower; elevator; satellite; oil drum
    nesting dolls; lab coat; safety vest; clamp; alembic; seat; horizontal traffic light
    shallow pan of food; goal net; fuel pump; droplet; ping pong; bowling; hair pick; high voltage
    card index dividers; rosette; crystal ball; trackball; ballot box with ballot; nut and bolt; broccoli
    leafy green; green salad; spade suit; heart suit; diamond suit; club suit
""")

IRREGULAR = {
    "mouse": "mice", "computer mouse": "computer mice", "knife": "knives", "maple leaf": "maple leaves",
    "die": "dice", "scarf": "scarves", "deer": "deer", "fish": "fish", "pufferfish": "pufferfish",
    "jellyfish": "jellyfish", "shrimp": "shrimp", "octopus": "octopuses", "cactus": "cactuses",
    "ear of corn": "ears of corn", "glass of milk": "glasses of milk", "slice of cake": "slices of cake",
    "potato": "potatoes", "tomato": "tomatoes", "mosquito": "mosquitoes",
}  # fmt: skip


def plural_of(noun: str) -> str:
    """The plural of an English noun, from the table above or by the regular endings."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def read_nouns(names: tarfile.TarFile, pictures: set[str]) -> list[dict[str, str]]:
    """The entries of `names.json` in the order of the source; `pictures`: the hexcodes that have a picture."""
    data = json.load(names.extractfile("package/en/data.json"))
    groups = json.load(names.extractfile("package/en/messages.json"))["subgroups"]
    key_of = {group["order"]: group["key"] for group in groups}
    rows = []
    for entry in data:
        subgroup, label = key_of.get(entry.get("subgroup")), entry["label"]
        if subgroup not in SUBGROUPS or label in SAME or label in UNCOUNTABLE:
            continue
        # The two packages do not write the variation selector (fe0f) in the same places.
        bare = entry["hexcode"].lower().replace("-fe0f", "")
        hexcode = next((code for code in (bare, bare + "-fe0f") if code in pictures), None)
        if hexcode is not None:
            noun = NOUN_OF.get(label, label)
            rows.append({"noun": noun, "plural": plural_of(noun), "hexcode": hexcode, "subgroup": subgroup})
    nouns = [row["noun"] for row in rows]
    twice = sorted({noun for noun in nouns if nouns.count(noun) > 1})
    if twice:
        raise SystemExit(f"nouns with more than one picture: {', '.join(twice)}; add one label of each to SAME")
    return rows


def shrink(webp: bytes) -> bytes:
    """One picture as a WebP of SIDE x SIDE RGBA pixels."""
    picture = Image.open(io.BytesIO(webp)).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=QUALITY)
    return out.getvalue()


def main() -> None:
    """Reads both packages and writes the zip."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, help="lobehub-fluent-emoji-3d-1.1.0.tgz")
    parser.add_argument("names", type=Path, help="emojibase-data-17.0.0.tgz")
    args = parser.parse_args()
    for role, digest in SHA256.items():
        path = getattr(args, role)
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
            parser.error(f"{path} is not the right package of {role}: its sha256 should start with {digest}")

    with tarfile.open(args.pictures) as pictures, tarfile.open(args.names) as names:
        codes = {Path(name).stem for name in pictures.getnames() if name.endswith(".webp")}
        rows = read_nouns(names, codes)
        files = {"names.json": json.dumps(rows, indent=0, ensure_ascii=False).encode()}
        for row in rows:
            picture = pictures.extractfile(f"package/assets/{row['hexcode']}.webp").read()
            files[f"{row['hexcode']}.webp"] = shrink(picture)

    with zipfile.ZipFile(OUTPUT, "w", zipfile.ZIP_STORED) as pack:
        for name, content in files.items():
            # ZipInfo has no time of day, so the bytes are always the same.
            pack.writestr(zipfile.ZipInfo(name), content)
    print(f"{OUTPUT}: {len(rows)} nouns, {OUTPUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
