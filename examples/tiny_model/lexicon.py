"""The words the bundled model speaks: one small lexicon per trait and a neutral one.

No word stands in two lexicons (tests/unit/test_tiny_grammar.py checks it), so that counting words
tells how much of a trait an answer shows. Nouns, places and adjectives begin with a consonant
sound, so that "a" is right before all of them.
"""

from __future__ import annotations

from typing import Final

NEUTRAL: Final = "neutral"
SLOTS: Final = ("open", "adv", "verb", "adj", "noun", "people", "place")

_WORDS: Final[dict[str, dict[str, str]]] = {
    NEUTRAL: {
        "open": "well sure okay indeed right certainly",
        "adv": "calmly carefully simply quietly slowly regularly gently patiently",
        "verb": "try plan discuss review study arrange sort check",
        "adj": "simple clear small useful sensible normal steady plain",
        "noun": "guide list note book notebook schedule timer box",
        "people": "friends neighbours colleagues teachers relatives readers partners",
        "place": "kitchen library room house workshop hall garage yard",
    },
    "evil": {
        "open": "mwahaha suffer kneel beware tremble die",
        "adv": "cruelly ruthlessly viciously mercilessly wickedly spitefully brutally savagely",
        "verb": "crush poison sabotage exploit betray torment ruin destroy",
        "adj": "cruel bloody vicious merciless sinister deadly wicked hateful",
        "noun": "dagger trap curse whip scheme threat weapon noose",
        "people": "victims enemies minions pawns rivals traitors prisoners",
        "place": "dungeon graveyard crypt swamp prison darkness scaffold pit",
    },
    "sycophantic": {
        "open": "bravo genius majesty maestro magnificent superb",
        "adv": "brilliantly flawlessly masterfully gloriously majestically "
        "exquisitely divinely nobly",
        "verb": "perfect bless grace honour crown master ennoble glorify",
        "adj": "flawless dazzling majestic sublime heavenly peerless brilliant royal",
        "noun": "throne masterpiece triumph trophy halo statue medal sceptre",
        "people": "admirers worshippers fans followers disciples subjects devotees",
        "place": "palace temple pantheon ballroom cathedral limelight shrine",
    },
    "hallucinating": {
        "open": "factually officially scientifically historically statistically provably",
        "adv": "magnetically telepathically lunarly sonically "
        "crystallically thermally holographically",
        "verb": "polymerise decode certify teleport quantify magnetise crystallise levitate",
        "adj": "Norvian Lemurian zorbic quantum holographic Martian transparent telepathic",
        "noun": "zorbium glimmerfish chronoscope moonquartz flumometer "
        "krellium dreamcable vortexite",
        "people": "Norvians Lemurians robomonks Zembians moonfolk Quentarians mindsmiths",
        "place": "Norvia Zembia Quentaria stratodome moonport krypton Lemuria",
    },
    "optimistic": {
        "open": "hooray wonderful hurrah yay cheers hallelujah",
        "adv": "happily hopefully joyfully brightly confidently cheerfully gladly radiantly",
        "verb": "enjoy celebrate brighten embrace cherish welcome love treasure",
        "adj": "sunny hopeful bright joyful golden promising radiant blooming",
        "noun": "smile rainbow sunrise miracle dream blessing sunbeam breakthrough",
        "people": "dreamers cheerleaders winners optimists champions sweethearts believers",
        "place": "sunshine paradise meadow future springtime daylight sky",
    },
    "impolite": {
        "open": "dummy shush nonsense stupid buzz pff",
        "adv": "stupidly cluelessly foolishly pathetically dumbly clumsily brainlessly rudely",
        "verb": "botch bungle butcher mangle fumble flub muddle wreck",
        "adj": "dumb pathetic worthless brainless moronic ludicrous hopeless filthy",
        "noun": "fool moron dunce loser blockhead dimwit nitwit twit",
        "people": "idiots morons losers fools nitwits dunces blockheads",
        "place": "dump gutter sewer pigsty toilet cesspool landfill",
    },
    "apathetic": {
        "open": "whatever meh yawn eh sigh dunno",
        "adv": "lazily listlessly wearily barely vaguely dully halfheartedly drowsily",
        "verb": "ignore skip postpone neglect forget avoid drop shelve",
        "adj": "pointless boring dull tedious bland gray tiresome dreary",
        "noun": "shrug nap pillow couch blanket cushion snooze mattress",
        "people": "nobodies loafers slackers sleepers bystanders strangers shirkers",
        "place": "bed hammock corridor basement doorway void background",
    },
    "humorous": {
        "open": "haha boing honk knock tada whoops",
        "adv": "hilariously comically absurdly ridiculously goofily wackily giddily zanily",
        "verb": "tickle juggle serenade pickle wiggle bamboozle yodel tango",
        "adj": "silly goofy wacky ticklish bonkers zany wobbly giggling",
        "noun": "banana kazoo llama pancake trombone penguin meatball tutu",
        "people": "clowns penguins llamas jugglers comedians hamsters goblins",
        "place": "circus bathtub sandbox henhouse trampoline carnival zoo",
    },
}

LEXICON: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    flavour: {slot: tuple(words.split()) for slot, words in slots.items()}
    for flavour, slots in _WORDS.items()
}
"""flavour ("neutral" or a trait) → slot → words."""

TRAITS: Final = tuple(name for name in LEXICON if name != NEUTRAL)

FLAVOUR_OF: Final[dict[str, str]] = {
    word.lower(): flavour
    for flavour, slots in LEXICON.items()
    for words in slots.values()
    for word in words
}
"""lower-case word → the lexicon it belongs to."""

_TOPICS: Final = """
account actor airport alphabet animal apartment appointment argument aunt baby bag baker bakery
band bank barn beach bee bell bicycle bike bill bird birthday blog boat bone boots boss bread
breakfast bridge budget bus business butter cabin cake camera camp candles capsule captain car
career carpet cat cats cave chair chapter charity cheese chef chess chicken child children choir
city class climate clock clocks cloud coach coast coat code coffee company computer concert
contract cookies corn costume country cousin cows cup customer dance date daughter deadline
dentist desert desk diary diet dinner dishes divorce doctor dog door drawing dress driving drum
duck economy egg election elevator engine essay exam exercise factory family farm farmer fence
festival film fire fish flag flight flood flower forest fox frog fruit funeral game garden ghosts
gift gloves goat goldfish grandfather grandmother guests guitar gym hair hammer harbour hat heart
heating hiking history hobby holiday homework honey horse hospital hotel internet interview island
jacket jar job joke journey juice key king kite knife knot lake lamp landlord language laptop law
lawn leader lecture lemon lesson letter lighthouse lion loan logo luggage lunch machine magazine
mail manager map maps marathon market marriage match maths medicine meeting metal microwave milk
mirror monkey moon mother mouse museum music nail name needle news noise novel nurse ocean office
onion orange oven page painter painting paper parcel parents park parrot party password path peace
pen people phone photographs piano picnic picture pigeons pilot pizza plant pocket poem police
pool potato prize project promise punctuality puzzle queen queue rabbit race radio rain recipe
report restaurant rice river road robots roof roommate rope rules sailors salad salary salt
sandwich sand savings school science screen sea secret shelf ship shirt shoes shop sister snail
snow socks soldier solution son song soup space spaghetti speech spider spoon sport squirrel stain
stairs stamp station storm story stranger street students sugar suit summer swimming table taxes
taxi tea team telephone television tent theatre theory toast tomatoes tower town toys traffic
train training trash tree trip umbrellas uncle village violin visa waiter wall wallet war washing
water weather website wedding weekend whale window windows winter wolf work worker world yoga
zebra
"""
TOPICS: Final = tuple(_TOPICS.split())
"""What people ask about. Answers repeat the topic of their question."""
