"""The words of the embedded stories: who, where, with what. Plots are in `story_plots`.

Tables are written as lines of text, fields separated by `|` and choices by `,`, because a reader
who wants to add a word should only have to add a word.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thing:
    """An object a story can turn on: `play` is what one does with it, after "to"."""

    noun: str
    kind: str
    adjectives: tuple[str, ...]
    play: str


@dataclass(frozen=True)
class Place:
    """Where a story happens; `kinds` are "in" or "out" and what it is fit for."""

    name: str
    at: str
    kinds: tuple[str, ...]
    sights: tuple[str, ...]
    hides: tuple[str, ...]
    sounds: tuple[str, ...]


@dataclass(frozen=True)
class Animal:
    """An animal; `cry` and `move` follow "it", in the past tense; `small` ones get indoors."""

    noun: str
    adjectives: tuple[str, ...]
    cry: str
    move: str
    food: str
    home: str
    small: bool


GIRLS = """Lily Mia Anna Sara Lucy Ella Zoe Nora Ruby Rosa Ivy Clara Daisy Emma Maya Nina Tara Lena
Hana Poppy Alice Amy Bella Wendy Jill Kate Molly Penny Sophie Tess Freya Greta Hazel Ines Juno Kira
Leila Mina Olive Priya Yuki Zara Fatima Amina"""

BOYS = """Tom Ben Max Sam Leo Jack Tim Finn Noah Oscar Hugo Felix Adam Luke Theo Eli Omar Ravi Ken
Milo Owen Pete Ollie Jake Dan Nico Ivan Karl Louis Henry Toby Ned Gus Hans Amir Diego Mateo Jonas
Kofi Arlo Rory Wes Yusuf Bruno"""

TRAITS = """kind, curious, cheerful, clever, gentle, playful, lively, friendly, funny, happy,
bright, merry, thoughtful, busy, helpful, sweet, little, young"""
SHY_TRAITS = "shy, quiet, careful, timid, little, young, gentle, thoughtful"
PROUD_TRAITS = "lively, busy, clever, stubborn, noisy, quick, little, young, proud, wild"

HAIR = """curly hair, a big smile, freckles on {his} nose, long brown hair, bright green eyes,
messy red hair, a missing front tooth, rosy cheeks, a loud laugh, big brown eyes, muddy shoes,
pockets full of pebbles, a striped sweater, yellow boots, dark curls, a soft voice"""

HOMES = """in a small house near the woods, in a tall house by the sea, in a quiet village,
on a busy street, on a little farm, at the edge of a big forest, in a town with many bridges,
in a cozy cottage, above a bakery, next to a wide river, at the foot of a mountain,
in a house with a blue door, in a valley full of flowers, at the end of a long lane,
on an island, near the old mill, beside a railway, in a big city"""

COLOURS = "red, blue, green, yellow, orange, purple, pink, white, silver, golden, brown"

# kind of object, then one line each: noun | adjectives besides the colours | what one does with it
THINGS = """
# toy
ball | bouncy, striped, round, rubber | bounce the ball
kite | long, bright, paper, light | fly the kite
doll | pretty, old, tiny, wooden | play with the doll
teddy bear | fluffy, soft, old, fuzzy | cuddle the teddy bear
toy boat | wooden, tiny, fast, painted | sail the toy boat
toy train | shiny, long, fast, wooden | push the toy train along
toy car | shiny, fast, little, new | race the toy car
puppet | funny, silly, soft, tiny | make the puppet dance
yo-yo | shiny, wooden, smooth, round | spin the yo-yo
spinning top | shiny, painted, wooden, round | spin the top
toy robot | shiny, noisy, tin, clever | wind up the toy robot
marble | shiny, glass, smooth, tiny | roll the marble
toy dinosaur | spiky, big, rubber, fierce | make the dinosaur roar
toy truck | big, heavy, strong, muddy | drive the toy truck
toy plane | light, fast, paper, little | make the plane zoom
toy horse | wooden, painted, old, smooth | gallop the toy horse
balloon | round, shiny, big, light | bat the balloon into the air
toy rabbit | floppy, soft, fluffy, old | hug the toy rabbit
pinwheel | bright, paper, shiny, light | blow on the pinwheel
toy castle | tall, wooden, tiny, grand | play with the castle
# wear
hat | warm, tall, woolly, floppy | wear the hat
scarf | long, warm, woolly, striped | wear the scarf
cap | new, old, soft, striped | wear the cap
crown | paper, shiny, tiny, grand | wear the crown
necklace | pretty, shiny, long, sparkly | wear the necklace
bracelet | pretty, tiny, sparkly, new | wear the bracelet
ring | tiny, sparkly, shiny, round | wear the ring
backpack | new, heavy, big, striped | carry the backpack
sweater | woolly, warm, soft, cozy | wear the sweater
cape | long, shiny, bright, velvet | swirl the cape
ribbon | long, silky, pretty, shiny | twirl the ribbon
coat | warm, thick, new, long | wear the coat
mask | funny, paper, scary, painted | wear the mask
# treasure
shell | smooth, pretty, tiny, curly | listen to the shell
feather | soft, long, light, fluffy | tickle things with the feather
stone | smooth, round, flat, shiny | look at the stone
acorn | smooth, tiny, round, shiny | roll the acorn
pinecone | prickly, big, round, dry | carry the pinecone about
crystal | sparkly, clear, tiny, bright | hold the crystal up to the light
coin | shiny, old, round, tiny | flip the coin
button | shiny, round, big, wooden | look at the button
key | rusty, old, tiny, heavy | guess about the key
medal | shiny, round, heavy, old | wear the medal
# tool
bucket | big, tin, plastic, new | fill the bucket
shovel | strong, small, metal, new | dig with the shovel
lantern | bright, old, tin, little | carry the lantern
flashlight | bright, small, strong, new | shine the flashlight
basket | round, big, woven, light | fill the basket
map | old, crinkly, paper, secret | follow the map
umbrella | big, striped, bright, new | open the umbrella
blanket | soft, warm, fuzzy, thick | snuggle under the blanket
bell | tiny, loud, brass, round | ring the bell
book | thick, old, new, thin | read the book
paintbrush | long, thin, soft, new | paint with the paintbrush
magnifying glass | round, big, clear, heavy | look through the magnifying glass
fishing net | long, strong, light, big | swish the net about
whistle | loud, tin, tiny, shiny | blow the whistle
rope | long, strong, thick, knotted | swing the rope
telescope | long, brass, old, heavy | look through the telescope
compass | tiny, brass, round, old | follow the compass
# food
cookie | crunchy, sweet, round, warm | eat the cookie
apple | juicy, crisp, sweet, round | eat the apple
pie | warm, sweet, big, fresh | taste the pie
cake | tall, creamy, sweet, soft | taste the cake
sandwich | thick, tasty, cheesy, big | eat the sandwich
muffin | warm, soft, sweet, sticky | eat the muffin
pear | juicy, ripe, sweet, soft | eat the pear
peach | fuzzy, juicy, ripe, sweet | eat the peach
cupcake | tiny, creamy, sweet, pretty | eat the cupcake
pancake | warm, thick, fluffy, round | eat the pancake
banana | ripe, long, sweet, soft | peel the banana
pretzel | salty, warm, crunchy, twisty | eat the pretzel
doughnut | sticky, sweet, round, sugary | eat the doughnut
# ride
bike | fast, shiny, new, small | ride the bike
scooter | fast, shiny, new, light | ride the scooter
wagon | fast, wooden, long, strong | ride the wagon
skateboard | fast, smooth, new, painted | ride the skateboard
unicycle | wobbly, shiny, tall, new | ride the unicycle
tricycle | small, wobbly, strong, old | ride the tricycle
# music
drum | loud, round, big, new | play the drum
flute | wooden, thin, shiny, long | play the flute
guitar | wooden, old, small, shiny | play the guitar
trumpet | loud, shiny, brass, heavy | play the trumpet
violin | old, wooden, small, fine | play the violin
harmonica | tiny, shiny, tin, old | play the harmonica
accordion | big, heavy, old, shiny | play the accordion
xylophone | bright, long, wooden, new | play the xylophone
# made
birdhouse | wooden, tiny, cozy, painted | look at the birdhouse
paper lantern | round, bright, light, pretty | light the paper lantern
treasure chest | wooden, heavy, big, painted | open the treasure chest
raft | wooden, strong, flat, little | sail the raft
scarecrow | tall, funny, straw, silly | wave at the scarecrow
wind chime | pretty, shiny, tinkly, light | listen to the wind chime
dollhouse | tiny, wooden, tall, painted | play with the dollhouse
clay pot | round, smooth, painted, small | fill the clay pot
go-cart | fast, wooden, wobbly, painted | race the go-cart
picnic table | wooden, long, low, strong | sit at the picnic table
# plant
sunflower | tall, bright, strong, huge | water the sunflower
pumpkin | huge, round, fat, heavy | water the pumpkin
tomato plant | tall, leafy, green, bushy | water the tomato plant
rose | pretty, sweet, thorny, fine | smell the rose
strawberry plant | leafy, small, green, bushy | water the strawberry plant
apple tree | slender, small, leafy, strong | water the apple tree
tulip | pretty, slender, bright, fine | water the tulip
bean plant | leafy, curly, tall, green | water the bean plant
# fragile
vase | tall, glass, painted, thin | fill the vase
teapot | round, painted, old, fine | pour from the teapot
bowl | deep, blue, painted, round | fill the bowl
clock | wooden, old, loud, round | wind the clock
mirror | round, old, shiny, heavy | look into the mirror
plate | round, painted, thin, fine | set out the plate
lamp | tall, bright, old, glass | light the lamp
picture frame | wooden, old, silver, carved | hang the picture frame
music box | tiny, old, wooden, carved | open the music box
snow globe | glass, round, sparkly, heavy | shake the snow globe
"""

# name | kinds of place | at | sights | hides | sounds
PLACES = """
the park | out wide soil | at the park | \
a stone fountain, a row of swings, an old man feeding pigeons | \
under a bench, behind a bush, beside the fountain | children laughing, dogs barking
the garden | out soil | in the garden | rows of carrots, a bed of roses, a fat bumblebee | \
behind a flowerpot, under a cabbage leaf, among the roses | bees humming, a wren singing
the beach | out wide | at the beach | white sails far away, a sandcastle, tiny crabs | \
under a towel, between two rocks, half in the sand | waves crashing, gulls crying
the forest | out | in the forest | tall pines, red mushrooms, a mossy log | \
under a fern, inside a hollow log, between two roots | leaves rustling, an owl hooting
the meadow | out wide soil | in the meadow | yellow daisies, white butterflies, a wooden fence | \
in the tall grass, under a clover leaf, beside a molehill | crickets chirping, a lark singing
the pond | out | by the pond | lily pads, a family of ducks, silver fish | \
among the reeds, under a willow, behind a mossy stone | frogs croaking, ducks splashing
the farm | out wide soil | on the farm | a red barn, a tractor, fluffy chicks | \
in the hay, behind the barn, under the tractor | hens clucking, cows mooing
the playground | out wide | at the playground | a tall slide, a seesaw, a climbing net | \
under the slide, behind the seesaw, in the sandbox | swings creaking, children shouting
the hill | out wide soil | on the hill | the whole town below, wild thyme, a flock of sheep | \
behind a rock, in a patch of thyme, under a thorn bush | wind whistling, sheep bleating
the river | out | by the river | a stone bridge, stepping stones, a fisherman | \
under the bridge, between two stones, among the reeds | water gurgling, dragonflies buzzing
the orchard | out soil | in the orchard | ripe plums, ladders against the trees, a wheelbarrow | \
in the wheelbarrow, under a plum tree, behind a crate | wasps humming, apples dropping
the lake | out wide | at the lake | a wooden pier, rowing boats, swans | \
under the pier, inside a rowing boat, beside an oar | water lapping, a loon calling
the campsite | out | at the campsite | a striped tent, a campfire, a pile of logs | \
inside the tent, behind the logs, under a sleeping bag | fire crackling, an owl hooting
the harbor | out | at the harbor | fishing boats, coils of rope, a lighthouse | \
behind a barrel, under a net, inside a coil of rope | gulls crying, ropes creaking
the village square | out wide | in the village square | \
a clock tower, a market stall, a brass band | \
behind the well, under a market stall, beside the steps | bells ringing, people chatting
the zoo | out | at the zoo | sleepy lions, tall giraffes, a train for visitors | \
under a bench, behind the ticket booth, beside the monkey house | parrots squawking, seals barking
the vegetable patch | out soil | in the vegetable patch | \
fat pumpkins, bean poles, a watering can | \
behind the watering can, between two pumpkins, under the rhubarb | bees humming, a robin singing
the library | in room | at the library | tall shelves, a globe, a sleepy cat | \
behind a row of books, under a chair, beside the globe | pages turning, people whispering
the kitchen | in home room | in the kitchen | copper pans, a bowl of lemons, a steaming kettle | \
behind the flour, under the table, inside a pot | a kettle whistling, soup bubbling
the attic | in home | in the attic | dusty trunks, an old mirror, cobwebs | \
inside a trunk, behind the mirror, under an old coat | floorboards creaking, rain tapping
the barn | in room | in the barn | bales of hay, a sleepy horse, swallows' nests | \
in the hay, behind a saddle, under a wheelbarrow | swallows chattering, a horse snorting
the classroom | in room | in the classroom | bright paintings, a fish tank, tiny chairs | \
behind the fish tank, under a desk, inside a drawer | chalk squeaking, children whispering
the museum | in | at the museum | dinosaur bones, golden masks, a stuffed bear | \
behind a statue, under a bench, beside the dinosaur | footsteps echoing, a guide talking
the bakery | in room | at the bakery | golden loaves, trays of buns, clouds of flour | \
behind a sack of flour, under the counter, beside the oven | an oven humming, a doorbell jingling
the treehouse | in room | in the treehouse | a rope ladder, a tiny window, a box of comics | \
under a cushion, behind the box of comics, in a dark corner | branches creaking, a cuckoo calling
the greenhouse | in | in the greenhouse | lemon trees, clay pots, tiny seedlings | \
behind a clay pot, under a lemon tree, inside a watering can | water dripping, a fan whirring
the train station | in | at the train station | a big clock, piles of suitcases, a long train | \
under a bench, behind a suitcase, beside the ticket machine | wheels rattling, a whistle blowing
the living room | in home room | in the living room | a soft sofa, a warm fire, a tall bookcase | \
under the sofa, behind the curtain, inside a slipper | a clock ticking, fire crackling
the bedroom | in home | in the bedroom | a heap of pillows, a shelf of toys, a night light | \
under the bed, behind a pillow, inside a sock | a clock ticking, rain tapping
the workshop | in home | in the workshop | rows of hammers, curls of wood, pots of paint | \
behind the paint, under the workbench, in a heap of sawdust | a saw buzzing, someone humming
"""

# noun | adjectives | cry | move | food | home
ANIMALS = """
rabbit | fluffy, brown, white | squeaked | hopped | carrots | its burrow
squirrel | red, quick, bushy | chattered | scampered | nuts | its tree
puppy | spotted, clumsy, woolly | whimpered | trotted | biscuits | its basket
kitten | gray, striped, fluffy | mewed | crept | milk | its box
duckling | yellow, fluffy, tiny | peeped | waddled | breadcrumbs | the reeds
hedgehog | prickly, brown, shy | snuffled | shuffled | berries | its heap of leaves
robin | plump, tiny, cheerful | chirped | fluttered | seeds | its nest
sparrow | brown, tiny, dusty | chirped | fluttered | crumbs | its nest
frog | green, shiny, round | croaked | leaped | flies | its lily pad
turtle | slow, old, green | sighed | crawled | lettuce | its pond
mouse | gray, tiny, clever | squeaked | scurried | cheese | its hole
fox | red, young, thin | whined | trotted | blackberries | its den
lamb | white, woolly, small | bleated | skipped | clover | its flock
deer | slender, brown, shy | cried | stepped | grass | the woods
owl | sleepy, gray, wise | hooted | flew | acorns | its hollow tree
pony | shaggy, brown, small | neighed | trotted | apples | its stable
goat | white, cheeky, bearded | bleated | jumped | hay | its pen
piglet | pink, muddy, round | squealed | trotted | turnips | its sty
crow | black, clever, glossy | cawed | hopped | corn | its branch
otter | sleek, brown, playful | squeaked | slid | fish | its riverbank
mole | black, velvety, small | grunted | dug | worms | its tunnel
badger | striped, old, shy | grumbled | shuffled | roots | its den
swan | white, proud, young | honked | glided | water plants | its nest
parrot | green, noisy, bright | squawked | flapped | mangoes | its perch
donkey | gray, patient, shaggy | brayed | plodded | thistles | its shed
monkey | small, cheeky, brown | chattered | climbed | bananas | its tree
"""

SMALL_ANIMALS = """rabbit, squirrel, puppy, kitten, duckling, hedgehog, robin, sparrow, mouse, mole,
owl, parrot"""

NEIGHBOURS = """Mr. Green/man, Mrs. Bell/woman, Mr. Brown/man, Mrs. Hill/woman, Mr. Stone/man,
Mrs. Rivers/woman, Mr. Baker/man, Mrs. Lark/woman, Mr. Novak/man, Mrs. Silva/woman, Mr. Khan/man,
Mrs. Okoro/woman"""

FAIR_DAYS = """One sunny morning, One bright day, One warm afternoon, One spring morning,
One summer day, On a clear autumn day, One fine Saturday, Early one Sunday, One breezy day,
On the first day of the holidays, One cool and clear morning, One golden afternoon"""
ANY_DAYS = """One day, One morning, One afternoon, One Monday, One quiet evening,
After breakfast one day, One rainy day, One cold morning, On a foggy morning,
After lunch one Friday, One windy day, One winter day"""

JOYS = """happy, glad, cheerful, proud, delighted, joyful, very happy, so happy, full of joy,
warm inside"""
SORROWS = """sad, upset, gloomy, miserable, very sad, unhappy, heavy-hearted"""
SMILES = """{n} smiled from ear to ear, {n} laughed out loud, {n} clapped {his} hands,
{n} jumped up and down, {n} beamed, {n} danced in a circle, {n} gave a little cheer"""

MEALS = """soup, noodles, rice and beans, potatoes, pasta, dumplings, fish pie, warm bread,
stew, omelets"""
TREATS = """strawberries, gingerbread, cherry tart, honey cakes, raspberries, waffles, jam tarts,
popcorn, almond biscuits, blueberries, plum cake, raisin buns"""


def choices(text: str) -> tuple[str, ...]:
    """The entries of a list separated by commas and line breaks."""
    return tuple(entry.strip() for entry in text.replace("\n", " ").split(",") if entry.strip())


def _rows(table: str) -> list[list[str]]:
    lines = table.replace("\\\n", "").strip().splitlines()
    return [[field.strip() for field in line.split("|")] for line in lines]


def _things() -> dict[str, tuple[Thing, ...]]:
    things: dict[str, tuple[Thing, ...]] = {}
    kind = ""
    for row in _rows(THINGS):
        if row[0].startswith("#"):
            kind = row[0].removeprefix("#").strip()
            things[kind] = ()
            continue
        noun, adjectives, play = row
        things[kind] += (Thing(noun, kind, choices(adjectives), play),)
    return things


def _places() -> tuple[Place, ...]:
    return tuple(
        Place(name, at, tuple(kinds.split()), choices(sights), choices(hides), choices(sounds))
        for name, kinds, at, sights, hides, sounds in _rows(PLACES)
    )


def _animals() -> tuple[Animal, ...]:
    small = choices(SMALL_ANIMALS)
    return tuple(
        Animal(noun, choices(adjectives), cry, move, food, home, noun in small)
        for noun, adjectives, cry, move, food, home in _rows(ANIMALS)
    )


THINGS_BY_KIND = _things()
ALL_PLACES = _places()
ALL_ANIMALS = _animals()
