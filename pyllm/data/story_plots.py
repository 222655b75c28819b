"""Plots of the embedded stories, first half: things lost, shared, broken, made and learned.

A plot begins with `== name | kinds of thing | kind of place, or any | traits`. Blocks separated by
an empty line are the story's sentences in order; each line of a block is one way to say it, and one
is drawn. A block that begins with `?` may be left out; `~` begins a new paragraph. In a line,
`[a|b]` is a choice and `{...}` a word of this story (capitalised when the name in braces is):
n he him his himself kid: the hero; f fhe fhim fhis fkid: a friend, a girl if the hero is a boy
and a boy if she is a girl, so that "he" and "she" are never in doubt; adult: mom, dad, grandma or
grandpa; nb nkid: a neighbour; o: the thing; ao: the thing with its adjective; play: what one does
with it; skill: the same, of any such thing; at, place, sight, hide, sound: the place; an, aadj,
acry, amove, afood, ahome: an animal;
day, joy, sad, smile, meal, treat, colour.
"""

PLOTS = """
== lost and found | toy wear treasure | any | default
{n} had a {ao} and took it everywhere.
Of all {his} things, {n} loved {his} {ao} most.
{His} favorite thing in the whole world was a {ao}.

{Day}, {n} took the {o} along and played {at}.
{Day}, {n} and {his} {adult} went out, and {n} was soon busy {at} with the {o}.
{Day}, {n} was {at}, and the {o} was there too.

? {n} saw {sight}, and {he} could not look away.
{n} stopped to look at {sight}.
{N} heard {sound} and ran to see.

~ But when it was time to go home, the {o} was gone.
Then {n} looked down. [Where was the {o}|The {o} was gone]!
After a while, {n} noticed that the {o} was missing.

"Oh no! I have lost my {o}!" cried {n}.
"My {o}! Where is it?" {n} called, and {his} eyes filled with tears.
{n} felt {sad}. "I had it a minute ago," {he} said.

{His} friend {f} came over. "Don't cry," {fhe} said. "Let us look again, slowly."
A {fkid} named {f} saw that {n} was {sad}. "I will help you look," {fhe} said kindly.
"Think," said {f}, who was passing by. "Where did you last see it?"

{They_two} looked high and low. They asked everyone they met.
First they looked in all the easy places. Then they looked in the hard ones.
They walked back, one step at a time, with their eyes on the ground.

? They found a pencil, a sock and an old spoon, but not the {o}.
"It is not here," said {f}, "and it is not there. We must go on."
{n} wanted to give up, but {f} took {his} hand.

~ At last, {f} pointed. There, {hide}, was the {o}!
Then something {colour} caught {fhis} eye. The {o} was {hide}!
And {hide}, safe and sound, lay the {ao}.

"You found it! Thank you, {f}!" said {n}, and hugged {fhim}.
{smile}. "Thank you for not giving up," {he} told {f}.
{n} held the {o} tight. "I could not have done it without you," {he} said.

From then on, {n} always put the {o} in a safe place, and {f} was {his} friend.
{n} learned that lost things are easier to find with a friend.
{They_two} played together until the sun went down, and nobody lost anything else.

== sharing | toy food ride music | any | proud
{n} got a {ao} for {his} birthday.
{Adult} gave {n} a {ao}, and {n} was {joy}.
{n} had saved up for a {ao}, and now it was {his}.

{Day}, {n} took it along. {He} wanted to {play} {at}.
{Day}, {he} sat {at}, all ready to {play}.

{His} friend {f} saw it. "Wow! May I have a turn?" {fhe} asked.
A {fkid} named {f} came closer. "What a lovely {o}! Will you share it?" asked {f}.
"Can I have some fun with it too?" asked {his} friend {f} in a small voice.

"No! It is mine," said {n}, and turned away.
{n} hid the {o} behind {his} back. "No, I got it first," {he} said.
{n} shook {his} head. "You can get your own {o}," {he} said.

{f} looked down at {fhis} shoes and walked away.
{f} felt {sad}. {Fhe} went and sat alone.
{f} did not say a word, but {fhis} lip trembled.

~ {n} was alone with the {o} now. It was not as much fun as {he} had thought.
Soon {n} grew bored. There was nobody to laugh with.
{n} looked at {f}, and the {o} did not seem so nice any more.

? {n} remembered the day when {f} had given {him} half of {fhis} [orange|sandwich|chocolate].
"How would I feel if {f} said no to me?" {n} wondered.
{Adult} had once said, "A thing that is shared is twice as good."

So {n} walked over to {f}. "I am sorry," {he} said. "Let us share."
{n} took a deep breath. "{f}, I was mean. Please come and join me," {he} said.
"Here," said {n}, and held out the {o}. "You go first."

{f} looked up and smiled. "Really? Thank you!" {fhe} said.
{F}'s eyes grew wide. "You are a good friend," {fhe} said.

~ {They_two} took turns, and they laughed [and laughed|until their sides hurt].
{They_two} sat side by side and shared, and even {sight} could not have been more fun to see.
First {f}, then {n}, then {f} again: it was the best day of the week.

{n} was {joy}. {He} had found out that sharing makes a good thing better.
"It is more fun with two," said {n}, and {he} meant it.
That day, {n} learned that a friend is worth more than any {o}.

== kindness returned | toy wear | out | default
{Day}, {n} took {his} {ao} and set off to play {at}.
{Day}, {n} went out with {his} {ao}. {He} could hardly wait to {play}.

{He} heard a tiny cry. It was a {aadj} {an}, and its foot was caught in a [fence|vine|string].
Near the path, a {aadj} {an} sat very still. It had a thorn in its foot.
All at once {he} heard a cry for help. A {aadj} {an} had fallen into a hole and could not get out.

"Please help me," {acry} the {an}.
"It hurts," {acry} the {an}. "Can you help?"
"Nobody stops for me," {acry} the {an} sadly.

{n} wanted to go on and {play}, but {he} put the {o} down at once.
{n} was late already, but {he} knelt down beside the {an}.
"Don't be afraid," said {n}. "I will not leave you here."

Slowly and gently, {he} helped the {an} until it was free.
{He} worked with great care. "There!" {he} said at last. "That is better."
It took a long time, but {n} was patient, and soon the {an} was free.

? {n} gave it some {afood} as well.
{n} stroked its back until it stopped shaking.
"Thank you," {acry} the {an}. "I will not forget this." It {amove} away to {ahome}.

~ But now a strong wind came, and the {o} was blown away!
When {n} turned around, the {o} had rolled down the slope and out of sight!
Later, {n} dropped the {o} into a deep, dark crack. {His} arm was too short to reach it.

{n} felt {sad}. "I will never see my {o} again," {he} said.
"My {o}!" cried {n}. There was nothing {he} could do.

Just then the {an} [came back|appeared again]. "You helped me. Now I will help you," it said.
But someone had seen it all. It was the {an}! "Wait here," it {acry}.

Off it {amove}, and in a moment it was back with the {ao}.
It {amove} straight to the {o}, which lay {hide}, and brought it to {n}.

"Oh, thank you, little {an}!" said {n}. {smile}.
{n} was {joy}. "You are a true friend," {he} told the {an}.

~ Since that day, {n} and the {an} have met {at} [every week|again and again].
Kindness had come back to {n}, as kindness often does.
{n} learned that even a small friend can be a big help.

== fear | toy wear | in | shy
There was one thing that {n} did not like: the dark.
{n} was good at many things, but {he} was afraid of the dark.
When the lights went out, {n} always pulled the blanket over {his} head.

{Day}, {n} was {at} when all the lights went out.
{Day}, {n} was {at}. A big storm came, and it grew as dark as night.
{Day}, {n} had to fetch something, and it was dark {at}.

Then there was a noise. Scratch, scratch, scratch!
Then {he} heard it. Thump! Thump! Thump!
Something went tap, tap, tap in the corner.

"What is that?" whispered {n}. {His} heart beat fast.
{n} froze. "Is it a monster?" {he} asked.
{n} wanted to run, but {his} legs felt like jelly.

~ {He} had {his} {ao} with {him}, and {he} held on to it tightly.
Luckily, {n} had brought {his} {ao}. Holding it made {him} feel a little bigger.
{n} hugged {his} {ao}. "If you are with me, I can be brave," {he} told it.

{He} took one step, and then another. The noise grew louder.
"One, two, three," {n} counted, and walked toward the noise.
{n} took a deep breath, as {his} {adult} had taught {him}, and went to look.

And there, {hide}, sat a {aadj} {an}! It was even more frightened than {n}.
It was no monster. It was a {aadj} {an} that had come in from the cold.
{He} looked {hide}. Two small eyes looked back. It was only a {aadj} {an}!

"So it was you!" laughed {n}. "Did you want to get warm?"
"Hello, little one," said {n} softly. "I will not hurt you."
{n} laughed. "I was afraid of you, and you were afraid of me," {he} said.

? {n} shared some {afood} with the {an}, and it {acry} softly.
The {an} {acry} and came closer.
When the lights came back, the {an} {amove} away to {ahome}.

~ "You were very brave," said {Adult}.
{Adult} came in and saw everything. "How brave you are, {n}!"

After that, the dark was not so bad. {n} knew that it was full of small friends.
{n} learned that being brave means being afraid and going on all the same.
That night, {n} turned off the light {himself}.

== making | made | any | default
{Day}, {n} had an idea. {He} wanted to make a {ao}.
{Day}, {n} saw a {ao} in a shop window, but it cost too much. "Then I will make one," {he} said.
"I am going to build a {o}," said {n} one day. "A {ao}!"

{He} gathered everything {he} needed: [wood|string|cloth], [glue|nails] and {colour} paint.
{He} looked around {at} and found many useful bits and pieces.
{n} asked {his} {adult} for some tools and set to work {at}.

{n} worked fast, because {he} wanted to be done by lunch.
{He} did not measure anything. "It will be fine," {he} said.
All morning {he} cut and glued and hammered.

But crash! The {o} fell apart.
But when {he} stepped back to look, the whole thing tipped over.
But one side was too long and the other too short, and it would not hold together.

"I can't do it!" shouted {n}, and {he} kicked the floor.
{n} sat down and put {his} head in {his} hands. {He} felt {sad}.
"It is no good," said {n}, close to tears.

~ {His} friend {f} came by. "It is a good start," {fhe} said. "Let us make a plan."
{Adult} sat down next to {him}. "My first one fell apart as well," said {Adult}. "Go slowly."
"Don't give up," said {Adult}. "Mistakes are how hands learn."

So {n} began again. This time {he} drew a plan and measured everything twice.
{n} wiped {his} eyes and tried again, slowly and with care.
The second time, {n} let the glue dry before {he} went on.

? It took [two days|all week|until evening], and {his} fingers were sticky.
{n} hummed a song while {he} worked.
{He} painted it {colour} and {colour2}.

At last it was done, and it did not fall apart. It was a wonderful {o}!
When {he} was finished, there stood the finest {ao} in the street.

~ {smile}. "I made it all by myself," {he} said, "well, almost!"
{n} was {joy}. {He} called everybody to come and see the {o}.

"You did not give up," said {Adult}. "That is the best part."
{n} learned that slow and careful work is quick in the end.
And from that day on, when something went wrong, {n} just said, "Let us try again."

== quarrel | toy music ride | any | proud
{n} and {f} were best friends. They did everything together.
{n} had a good friend named {f}, who lived next door.

{Day}, they found a {ao} {at}.
{Day}, they were {at}, and there they saw a {ao} in a box with the words "Free to take".

"I saw it first!" shouted {n}. "No, I did!" shouted {f}.
"It is mine," said {n}. "I want to {play}!" "No, mine!" said {f}.

{n} pulled one end and {f} pulled the other.
{They_two} grabbed the {o} at the same time, and nobody would let go.

Crack! The {o} broke.
Snap! A piece came off and flew through the air.
There was a loud crack, and the {o} was broken.

~ {n} was angry with {f}, and {f} was angry with {n}. They both went home.
"Look what you did!" they both cried. {f} stamped {fhis} foot, and {n} ran off.

At home, {n} could not eat {his} {meal}. {He} kept thinking of {f}.
That evening it was very quiet. {n} missed {his} friend.
{n} lay on {his} bed and stared at the ceiling. {He} felt {sad}.

"A {o} can be mended," said {Adult}, "and so can a friendship."
"What would make it better?" asked {Adult}. {n} thought about it for a long time.

~ The next day, {n} went to find {f}. "I am sorry that I pulled," {he} said.
{n} knocked on {F}'s door. "I am sorry," {he} said. "You matter more to me than a {o}."

"I am sorry too," said {f}. "I should have let you try it."
"I was just coming to tell you the same thing," said {f}, and {fhe} smiled.

Together they mended the {o} with glue and {colour} string.
{They_two} got some tape and fixed the {o}. It was not perfect, but it worked.

? Now it had a crooked line in the middle. "That is where we made up," said {f}.
"I think it looks even better now," said {n}.

Then they took turns, and they did not quarrel again that day.
{n} was {joy}. A good friend is worth saying sorry for.
And each of them let the other go first.

== learning | ride music | any | shy
{n} had always wanted to {skill}.
More than anything, {n} wished that {he} could {skill}.
"When I am big, I will {skill}," {n} often said. But why wait?

{Day}, {his} {adult} gave {him} a {ao}.
{Day}, {n} found an old {o} {at}. "You may try it," said {his} {adult}.

{n} tried at once, but it was harder than it looked.
The first try went wrong. The second try went wrong as well.
"This will be easy," thought {n}. But it was not easy at all.

Some children laughed. {n} turned red.
{His} friend {f} could do it very well, and that made {n} feel small.
{n} tried ten times, and ten times it went wrong.

"I will never learn it," {he} said, and felt {sad}.
"I give up," said {n}, and pushed the {o} away.

~ "I could not do it either, at first," said {his} friend {f}. "I practiced. I can show you how."
{Adult} put an arm around {him}. "A little every day," said {Adult}. "That is the whole secret."
{His} friend {f} sat down next to {him}. "Watch me," {fhe} said. "Slowly, like this."

So {n} practiced on Monday, on Tuesday and on Wednesday.
Every day after school, {n} practiced for [ten minutes|half an hour], even when it rained.
{n} began with the easy part. When {he} could do that, {he} went on to the next.

? On some days {he} was tired, but {he} did not stop.
By Friday it was a little better, and by Sunday it was better still.
There were bumps and wrong notes and a few tears as well.

~ And then it happened. All of a sudden, {n} could do it!
One morning, everything went right from beginning to end.

"Look at me!" {he} called. "I can {play}!"
{smile}. "Did you see that?" {he} asked.

{Adult} clapped and cheered. "I knew you could do it!"
Everybody {at} stopped to watch, and they all clapped.

{n} was {joy}. {He} had learned that practice makes hard things easy.
That night, {n} made a list of all the other things {he} wanted to learn.
The next week, {n} taught a smaller child, slowly, one step at a time.

== honesty | fragile | in | default
In {n}'s house there was a {ao}. It belonged to {his} {adult}, who loved it very much.
On a shelf stood a {ao}. "Please be careful with it," {Adult} always said.

{Day}, {n} was playing with a ball inside, though {he} knew that {he} should not.
{Day}, {n} spun around and around until {he} was dizzy.
{Day}, {n} pretended to be a pirate and swung a long stick.

Bump! The {o} fell to the floor and broke.
Crash! Down came the {o}, and now it lay there in pieces.

{n}'s heart beat fast. Nobody had seen it.
{n} stood very still. "Oh no," {he} whispered.

Quickly {he} hid the pieces under the sofa.
{He} pushed the pieces under the rug and ran to {his} room.

~ "Has anybody seen my {o}?" asked {Adult} later. {n} said nothing.
At dinner there was {meal}, but {n} could not eat. {His} tummy hurt.
"Maybe the cat did it," {n} thought of saying. But that would not be true.

? The secret felt as heavy as a stone.
{n} tried to read a book, but {he} could think of nothing else.
All evening {n} could not look {his} {adult} in the eye.

At last {n} could not bear it any more. "I broke your {o}," {he} said. "I am so sorry."
Finally {n} fetched the pieces and told {his} {adult} the whole story.

{Adult} was quiet for a moment. "I am sad about the {o}," {Adult} said, "but I am glad that you \
told me the truth."
"Thank you for telling me," said {Adult}. "That was harder than hiding it, wasn't it?"

~ Then they took some glue and put the {o} together, piece by piece.
{n} used the coins from {his} piggy bank to help pay for a new {o}.

The {o} had a few cracks now, but {n} felt as light as a feather.
{n} was {joy} again, and {his} tummy did not hurt any more.

{He} had learned that the truth is hard to say, but a lie is harder to carry.
After that, {n} played ball outside, and told the truth inside.

== new friend | toy food tool | any | default
{Day}, a new {fkid} came to {n}'s street. {Fhis} name was {f}.
A {fkid} named {f} had just moved to the town. {Fhe} did not know anyone.

{f} stood all alone {at} and looked at the ground.
{Day}, {f} sat {at} and watched the others play. Nobody talked to {fhim}.

{n} saw {fhim}. {He} remembered how it felt to be new.
"That new {fkid} looks {sad}," thought {n}. {He} looked at {his} own {ao}.
{n} felt sorry for {fhim}, but {he} was a bit shy as well.

? The other children said, "{Fhe} talks in a funny way." But {n} did not care.
"What if {fhe} does not like me?" {n} wondered.

{n} walked over. "Hi! My name is {n}. Do you want to see my {ao}?" {he} asked.
So {n} took {his} {ao} and sat down next to {fhim}. "Do you want to share it?" {he} asked.

{f} looked up. Slowly, a smile came to {fhis} face. "Yes, please," {fhe} said.
At first {f} was too shy to speak. But then {fhe} nodded.

~ {They_two} sat together, and {f} told {n} about the [far country|big city|island] that \
{fhe} came from.
{f} knew a game that {n} had never heard of, and {fhe} taught {him} how to play it.
{f} taught {n} how to say hello in another language. It sounded like a song.

They laughed so much that the other children came to see what was so funny.
Soon they saw {sight}, and {f} made up a funny story about it.

"May we play too?" asked the others. "Of course!" said {f} and {n}.
One by one, the other children joined in.

~ At the end of the day, {f} was not alone any more.
When it was time to go home, {f} waved to everyone. "See you tomorrow!" {fhe} called.

{n} was {joy}. One kind word had been enough to make a friend.
{n} learned that every friend was once a stranger.
"{f} is my new friend," {n} told {his} {adult} over a bowl of {meal}.

== messy room | toy wear tool music | in | proud
{n} never liked to tidy up. There were socks on the lamp and crumbs in the bed.
"Please tidy your room," said {Adult}. "Later," said {n}. {He} always said that.

{Day}, {n} was going to meet {his} friend {f}, and {he} needed {his} {ao}.
{Day}, {n} got a call from {his} friend {f}. "Bring your {ao}!" {fhe} said.

But where was it? {n} looked under the bed. {He} found an old apple, but not the {o}.
{n} dug through heaps of clothes and towers of boxes. There was no {o}.

"Somebody took my {o}!" cried {n}.
"It must be here!" said {n}, and {he} threw everything into the air.

? A box fell over and a hundred beads rolled across the floor.
The mess grew bigger and bigger.

~ "Nobody took it," said {Adult}. "It is hiding in the mess."
{Adult} looked in. "A thing without a place is easy to lose," said {Adult}.

{n} sighed and began to tidy up. Books went on the shelf and socks went in the drawer.
So {n} picked up one thing after the other: blocks, crayons, shoes and a half of a sandwich.
{f} came to help. {Fhe} sang a tidy song, and that made it go faster.

Little by little, the floor came out. It was {colour}! {n} had forgotten that.
{n} found three things {he} had thought were gone for good.

And there, at the very bottom of the heap, was the {ao}.
And then, behind the last pillow, {he} saw the {o}.

~ "There you are!" said {n}. {He} was {joy}.
{smile}. Now {he} could {play} with {f} at last.

{n} gave the {o} a place of its own on the shelf, and it was never lost again.
"Next time I will tidy up first," {n} promised. And most of the time, {he} did.
"A tidy room is a quick room," said {n}, and {his} {adult} laughed.
"""
