"""Plots of the embedded stories, second half, in the notation of `story_plots`: secrets, races,
weather, gifts, patience, mysteries and other adventures.
"""

MORE_PLOTS = """
== surprise | toy wear music treasure | home | default
Soon {his} friend {f} would have a birthday, and {n} had bought {fhim} a {ao}. It was a secret.
{n} was planning a surprise for {his} friend {f}. {He} had a {ao} to give to {fhim}.

{Day}, {n} hid the {o} {hide} and told nobody.
{He} wrapped the {o} in {colour} paper and put it {hide}.

Just then {f} came in. "What are you doing?" {fhe} asked. "Nothing!" said {n} quickly.
"What do you have there?" asked {f}. "I can't tell you," said {n}, and turned red.

~ All week, {n} whispered with the others. When {f} came near, they stopped talking.
The next day, {n} had no time to play. "I am busy," {he} said, and ran away.

{f} felt {sad}. "{n} does not like me any more," {fhe} thought.
{f} thought that {n} had found a better friend, and {fhe} cried a little.
"Why does everyone have a secret but me?" {f} asked {fhimself}.

? {f} ate {fhis} lunch alone that day, though there was {treat}.
It rained that evening, and {f} looked out of the window for a long time.

~ On the birthday, {f} opened the door very slowly. It was dark inside.
On Saturday, {n} came to fetch {f}. "Close your eyes," {he} said, "and come with me."

"Surprise!" shouted {n} and all the others. There were balloons and {treat} and a big cake.
The light went on. "Happy birthday!" they all called, and they sang a song.

{n} held out the {o}. "This is what I was hiding," {he} said.
{n} ran to get the present. "This is for you. I am sorry that I could not tell you," {he} said.

{f} opened it. It was a {ao}! "It is just what I wished for!" {fhe} cried.
{f} tore off the paper and laughed with joy. "A {ao}! Thank you, {n}!"

{f} laughed. "And I thought that you did not like me!" {fhe} said. "Silly," said {n}.
"I thought you had forgotten me," said {f}. "Never," said {n}, and they hugged.

{n} was {joy}. A good surprise is worth a little waiting.
Some secrets are made of love, and this was one of them.
From then on, when {f} was worried about something, {fhe} asked {n} first.

== race | ride | wide | proud
{n} and {his} {ao} were the fastest in town, and {he} told everyone so.
{n} loved to win. {He} had a {ao}, and {he} practiced every day.

{Day}, there was a big race {at}. The prize was a golden cup.
{Day}, all the children met {at} for a race. The winner would get a silver cup.

"I will win for sure," said {n}. {His} friend {f} only smiled and got ready.
A {fkid} named {f} stood next to {him}. {Fhis} {o} was old and {colour}. "Good luck," {fhe} said.

"Ready, steady, go!" The children shot off, with {n} in front.
A whistle blew, and off they went past {sight}.

{n} was ahead, and {f} was close behind. The wind blew in {his} face.
Faster and faster they went. Soon only {n} and {f} were in front.

~ Then {n} heard a cry. {f} had fallen down and was holding {fhis} knee.
Suddenly {f} hit a stone and fell with a bump.

{n} could see the finish line. {He} could win! But {f} was crying.
"If I stop, I will lose," thought {n}. {He} looked back, and then {he} knew what to do.

{He} stopped and turned around. "Are you hurt?" {he} asked.
{n} left {his} {o} on the grass and ran back. "Let me help you up," {he} said.

? {He} tied {his} clean handkerchief around {F}'s knee.
"But you will lose!" said {f}. "That does not matter," said {n}.

Other children rushed past them, one after another.
They went on together, slowly, side by side, and came in last.

~ Everyone clapped for them. A judge gave {n} a ribbon that said "Best Friend".
The winner came over and held out the cup. "I think this belongs to you two," the winner said.

{n} was {joy}, even though {he} had not won.
{n} had never come in last before. It felt better than {he} had thought.

{He} had learned that a kind heart is better than a fast pair of feet.
"Next time we will race again," said {f}, "and I will try to beat you!" They both laughed.
"Some things are more important than winning," {n} told {his} {adult} that evening.

== storm | toy tool wear | out | default
{Day}, {n} and {his} friend {f} went out to have a picnic {at}. {n} carried {his} {ao}.
{Day}, {n} and {his} friend {f} were playing {at} with a {ao}.

The sun was shining, and they could hear {sound}.
They saw {sight}, and they ate {treat} on the grass.

Then the sky turned gray. A big drop fell on {N}'s nose. Plop!
But dark clouds came over the hill, and the wind began to howl.
All at once it grew cold. Thunder rumbled far away.

"It is going to rain!" said {f}. "We must find shelter."
"Run!" cried {n}. Rain came pouring down.

They ran as fast as they could and hid in a little hut.
They found a small cave and sat close together.
A farmer waved from a shed. "Come in here!" the farmer called.

~ Boom! went the thunder. {f} was frightened and began to shake.
Lightning lit up the sky, and {f} covered {fhis} ears.

{n} gave {fhim} the {o} to hold. "Count with me," {he} said. "When we get to ten, it is further \
away."
"Let us sing as loud as the storm," said {n}. So they sang, and {f} held the {o} tight.
{n} told {fhim} a funny story about the {o}, and soon {f} forgot to be afraid.

? A {aadj} {an} came in too, all wet. It {acry} and shook itself, and they laughed.
Water ran past the door like a little river.

~ After a while the rain stopped, and the sun came out again.
Little by little the thunder went away, and the birds began to sing.

"Look!" said {f}. There was a rainbow over {place}, with every color in it.
Outside, everything shone, and a rainbow stood in the sky.

They jumped in the puddles all the way home.
{They_two} walked home hand in hand. {Adult} had warm towels and {meal} ready for them.

{n} was {joy}. Even a storm is not so bad with a friend.
{f} gave the {o} back. "Thank you," {fhe} said. "You were my sunshine."
They learned that rain does not last forever, and that what comes after it can be lovely.

== greed | food | room | proud
{n} loved sweet things more than anything else.
"More!" was {N}'s favorite word.

{Day}, {his} {adult} made a {ao} for everyone and left it on a plate {at}.
{Day}, there was a party {at}. On the table stood a plate, and on the plate was a {ao}.

"Please wait for the others," said {Adult}. But {n} did not want to wait.
"One each," said {Adult}. But {n} was not listening.

When nobody was looking, {n} ate the whole {o}. It was delicious.
{n} took a bite, and another bite, and soon the {o} was gone.

Then {he} ate two plums, three buns and a big bowl of {treat}.
But {n} still wanted more, and {he} ate the part that was for the others as well.

~ Soon {n} felt strange. "Oh, my tummy!" {he} groaned.
Then {his} tummy began to hurt. It hurt so much that {he} had to lie down.

{His} friend {f} came in with an empty plate. "Is there nothing left for me?" {fhe} asked.
The other children looked at the empty table. {His} friend {f} looked {sad}.

{n} felt bad inside, and not only in {his} tummy.
{n} wished that {he} had waited.

"I ate it all," said {n} in a small voice. "I am sorry."
{n} told the truth. "It was me," {he} said. "I did not think of you."

? {Adult} gave {him} some tea and a warm blanket.
"A tummy is small," said {Adult}, "even when the eyes are big."

~ The next day, {n} felt better. {He} baked something new with {his} {adult}, just for {f}.
When {he} was well again, {n} worked all morning to make a new treat.

{He} cut it into equal pieces, and the biggest was for {f}.
"You first," said {n}, and gave it to {f}.

{f} smiled and broke {fhis} piece in two. "Half for you," {fhe} said.
It tasted even better than the first one, because everyone was smiling.

{n} had learned that enough is as good as a feast.
After that, {n} had a new favorite word. It was "Share!"

== growing | plant | soil | default
{Day}, {nb}, the old {nkid} next door, gave {n} a tiny seed. "One day it will be a {ao}," said {nb}.
{n} found a little seed in a paper bag. "It will be a {ao} if you are patient," said {his} {adult}.

{n} put the seed into the earth {at} and gave it some water.
{n} dug a small hole {at}, dropped the seed in and covered it with soft soil.

{He} sat down to wait. Nothing happened.
{n} waited all day. "Is it broken?" {he} asked.

The next morning, {n} ran out to look. There was only brown soil.
On the second day, there was nothing. On the third day, there was nothing.

"Why does it take so long?" {he} asked and felt {sad}.
"Grow!" {n} told the seed. "Please grow!" But the seed did not hurry.

~ "Seeds are busy under the ground, where we can't see them," said {Adult}. "Keep on watering."
"Good things need time," said {Adult}. "Give it water and sunshine, and wait."

So {n} watered it every morning, and pulled out the weeds.
Every day {n} came with a can of water, and told the seed a story.

? A {aadj} {an} came by and wanted to dig, but {n} gave it some {afood} instead.
Once there was a storm, and {n} put a box over the spot to keep it safe.

~ Then, one morning, there was a tiny green tip!
After two weeks, something small and green looked out of the earth.

"It is alive!" shouted {n}. {smile}.
{n} lay down on {his} tummy to see it better. "Hello, little one," {he} whispered.

Week by week it grew. It grew as high as {his} knee, and then as high as {his} nose.
It grew one leaf, then two, then ten.

By the end of summer it was a {ao}, and everyone came to look at it.
At last, there stood a {ao}, the finest in the whole street.

{n} was {joy}. {He} gave a seed of it to {his} friend {f} and said, "Be patient."
{n} had learned that you can't hurry a {o}, but you can care for it.
"I did not do much," said {n}. "You did something every day," said {Adult}. "That is a lot."

== giving | wear tool | out | default
{n} had a {ao}. It was {his} best {o}, and {he} was very proud of it.
{n} had saved for a long time to buy a {ao}. Now it was {his}.

{Day}, {n} was {at} when {he} saw {nb}, an old {nkid} who lived alone.
{Day}, {n} met {nb} {at}. The old {nkid} looked tired and {sad}.

"What is wrong?" asked {n}. "I had a {o} like yours," said {nb}. "It was stolen."
"Is everything all right?" {n} asked. "My house burned down," said {nb}, "and my {o} was in it."

{n} looked at {his} {o}. {He} liked it so much. But {he} had many nice things.
{n} thought for a long time. {He} held the {o} tight, and then {he} made up {his} mind.

? "Would anyone miss a kind deed?" {n} thought. "Yes, the one who needs it."
{n} could hear {sound}, and {he} took a deep breath.

"Please take mine," said {n}, and held it out. "I want you to have it."
"This is for you," {he} said. "I think you need it more than I do."

~ {Nb} could not believe it. "For me? Are you sure?" "I am sure," said {n}.
Tears came to {Nb}'s eyes. "Nobody has been so kind to me for years," said {nb}.

{n} walked home with empty hands, but {his} heart was full.
On the way home, {n} noticed that {he} was humming a song.

"Where is your {o}?" asked {Adult}. {n} told the whole story, and {Adult} hugged {him}.
That night it was quiet in {his} room without the {o}, but {n} slept well.

~ The next week, {nb} came to the door with a basket of {treat}. "For my friend," said {nb}.
A few days later, {nb} came by. "I can't give you a {o}," said {nb}, "but I can teach you to bake."

They sat together and {nb} told stories about the old days.
From then on, {n} visited {nb} every Sunday, and they drank tea and ate {treat}.

{n} was {joy}. {He} had given away a {o} and found a friend.
{n} learned that giving can make you richer.

== stuck | toy wear | out | default
{Day}, {n} and {his} friend {f} went out to {play} {at}.
{Day}, {n} took {his} {ao} outside. {He} was {at} with {his} friend {f}.

But a strong wind came and blew the {o} up into a tall tree.
{n} threw the {o} high into the air, and it got stuck on the roof of a shed.

"Oh no! It is stuck!" cried {n}. {He} jumped, but {he} could not reach it.
"I can't get it down," said {n}. {He} stood on {his} toes, but it was too high.

First {he} threw a stick at it. The stick got stuck as well.
First {he} tried a long pole, but the pole was too short.

? Then {he} shook and shook. Only leaves came down.
Then {he} stood on a box. The box tipped over, and {he} landed in the mud.

{n} felt {sad}. "It will have to stay there forever," {he} said.
{n} kicked the ground. "Nothing works!" {he} shouted.

~ "Let us think," said {f}. "[What do we have|What is tall, and what can climb]?"
{f} sat down and thought. "Alone we are too short," {fhe} said, "but together we are tall."

A {aadj} {an} looked at them and {acry}. That gave {n} an idea!
Then {n} looked around and saw {sight}. "I have an idea!" {he} said.

{n} tied a rope to a bucket, and {f} swung it up. It caught the {o}!
{He} let {f} climb on {his} shoulders, and {f} stretched out {fhis} arm as far as {fhe} could.
They went to fetch {nb}, who had a long ladder, and held it while {nb} climbed up.

~ Down came the {o}, right into {his} arms.
Slowly, slowly, the {o} came loose, and then it fell, plop, onto the grass.

"We did it!" they shouted. {smile}.
"Hooray!" cried {f}, and they danced around the {o}.

{n} was {joy}. {He} learned that two heads are better than one.
"When one way does not work," said {n}, "there is always another."
After that, they played a little further away from high places.

== mystery | food | room | default
{Day}, {n} put a {ao} on the table {at}. When {he} came back, it was gone!
Every day something went missing {at}. {Day}, it was a {ao}.

"Who took the {o}?" asked {n}. "Not me," said {Adult}. "Not me," said {his} friend {f}.
"This is a mystery," {n} told {his} friend {f}. "We will solve it."

{He} took a magnifying glass and looked for clues.
{n} put on a detective's hat, and {f} brought a notebook.

On the floor there were crumbs, and next to them were tiny footprints.
There was a trail of crumbs. It led past the door and around the corner.

? "Too small for a thief," said {f}. "Too small for a cat as well."
{f} wrote it all down: "Clue number one: crumbs. Clue number two: feet."

"Follow me," whispered {n}, and they followed the trail on tiptoe.
Step by step, {they_two} followed the trail. They could hear {sound}.

~ It ended {hide}. Something moved there. "Who is it?" asked {n}.
And there, {hide}, they heard a soft noise.

It was a {aadj} {an}, with three hungry babies beside it!
Two bright eyes looked up at them. It was a {an}, and it was feeding its little ones.

"So you are the thief," said {n}. But {he} was not angry.
"Shh," said {f}. "They are only hungry."

"I am sorry," {acry} the {an}. "I could not find any {afood}."
The {an} {acry} and held the last crumb close.

~ {n} put down some {afood}. "Next time you may just ask," {he} said.
"You can have this," said {n}, and {he} gave them {afood} and some water.

The babies ate until their tummies were round, and then they fell asleep.
The {an} looked at {him} with thankful eyes.

Nothing was ever stolen again. Each evening, {n} left a little bowl by the door.
{n} was {joy}. The mystery was solved, and it had a happy end.
{n} learned to look twice before getting angry at somebody.

== getting lost | tool wear | out | proud
{Day}, {n} and {his} {adult} were {at}. {n} had brought {his} {ao} along.
{Day}, {n} went out with {his} {adult}. They were {at}, and {n} had {his} {ao} with {him}.

"Stay where I can see you," said {Adult}. "I will," said {n}.
"Don't go too far away," said {Adult}, and {n} nodded.

Then {n} saw a {aadj} {an}. It {amove} away, and {n} ran after it.
But then a {aadj} {an} {amove} past. {n} wanted to see where it lived, so {he} followed it.

{He} ran left and right, over a ditch and through a hedge.
On and on {he} went, and {he} did not look back once.

When {n} stopped, {he} did not know where {he} was.
The {an} was gone, and so was the path. {n} was all alone.

"{Adult}?" called {n}. Nobody answered. {He} felt {sad} and afraid.
"Which way is home?" asked {n}. There was only the sound of the wind.

? It was getting late, and the shadows were growing long.
{n} ran one way, and then the other, and came back to the same tree.

~ {n} sat down. "{Adult} told me to stay in one place if I am lost," {he} remembered.
"Crying will not help," {he} told {himself}. "I have to think."

{He} took out {his} {o} and held it up high, so that the sun shone on it.
{n} hung the {o} on a branch, where everyone could see it.
{He} put the {o} on a tall stone as a sign, and called as loud as {he} could.

Then {he} waited and sang a song so that {he} would not be afraid.
{n} counted to a hundred, and then to a hundred again.

~ "{n}! {n}!" Somebody was calling. It was {his} {adult}!
At last {he} heard steps. It was {his} friend {f} with {Adult}. "We saw your {o}!" {f} shouted.

{n} ran into {his} {adult}'s arms. "I am sorry that I ran away," {he} said.
{n} was hugged for a long, long time. Nobody was angry, but everyone had been worried.

"You were clever to stay in one place, and even more clever to use the {o}," said {Adult}.
"That {o} was a good sign," said {Adult}. "But next time stay with me."

{n} held {Adult}'s hand all the way home, and at home there was {meal}.
{n} was glad to be home, and {he} never ran off again without asking.
That night {n} put the {o} next to {his} bed. It had brought {him} home.

== trade | toy wear treasure | any | proud
{n} had an old {o}. It had been {his} for as long as {he} could remember.
{n} had a {o}. It was not new, but they had been through a lot together.

{Day}, {n} met {his} friend {f} {at}. {F} had a new {colour} [toy rocket|racing car|jumping frog].
{Day}, a {fkid} named {f} showed {n} a new, shiny [sticker book|racing car|jumping frog].

"Do you want to trade?" asked {f}. "Mine for your {o}."
"I will give you this if you give me your {o}," said {f}.

{n} did not think about it. "Yes!" {he} said at once.
It was so shiny! {n} gave the {o} to {f} and ran home.

~ At first it was fun. But after an hour, {n} was bored.
The new thing was nice, but it broke before dinner.

At night, {n} could not sleep. {He} missed {his} {o}.
When {n} went to bed, there was an empty place where the {o} had been.

"It was old," {n} said to {his} {adult}, "but it was mine." {He} felt {sad}.
{n} remembered all the good times with the {o}, and a tear ran down {his} cheek.

? {Adult} sat down on the bed. "Shiny is not the same as dear," said {Adult}.
"You could go and ask," said {Adult}.

~ In the morning, {n} ran to {F}'s house. "May I have my {o} back, please?" {he} asked.
Early the next day, {n} went to see {f}. "I made a mistake," {he} said.

{f} thought about it. "I like it," {fhe} said, "but I can see that you love it."
"I had a feeling that you would come," said {f}, and {fhe} smiled.

{f} gave it back, and {n} gave {fhim} a bag of {colour} marbles to say thank you.
"Here it is," said {f}. "But may I visit it?" "Any time!" said {n}.

{n} hugged the {o}. It was not shiny, but it was {his}.
{smile}. {He} would not have given it away for all the toys in the world.

{n} learned that old friends are worth more than new things.
From then on, {n} thought twice before {he} said yes.
That night, {n} slept well, with the {o} by {his} side.

== teamwork | made | out | default
{Day}, {n} heard that there was going to be a fair {at}. Everyone could bring something.
There was a contest {at}: who could make the best {o}?

{n} wanted to make a {ao}, and so did {his} friend {f}.
"I will make a {ao}," said {n}. "So will I," said {his} friend {f}.

{n} had wood and nails, but no paint.
{n} was good at cutting, but {he} was not good at painting.

{f} had paint and brushes, but no wood.
{f} could paint anything, but {fhe} did not know how to use a saw.

Each of them worked alone, and it went badly.
{n} worked on one side of {place}, and {f} worked on the other. They did not talk.

{N}'s {o} looked dull, and {F}'s {o} fell over.
By noon, they both felt {sad}. Nothing was done.

? A {aadj} {an} watched them both and {acry}, as if it wanted to say something.
They could hear {sound}, but nobody sang along.

~ {n} looked at {f}, and {f} looked at {n}. They both began to laugh.
"Your colors are beautiful," said {n}. "Your corners are so straight," said {f}.

"Why don't we make one together?" asked {n}. "Yes!" said {f}.
"You saw, and I paint," said {f}. "And we both carry," said {n}.

So {n} cut and hammered, and {f} painted it {colour} and {colour2}.
They shared the wood and the paint, and the work went twice as fast.

~ When the fair began, there it stood: a {ao}, and nobody had seen a better one.
In the evening it was ready. It was a {ao}, straight and strong and full of color.

They won the first prize, a big basket of {treat}, and they ate it together.
They did not win, but everyone wanted to see their {o}, and that made them {joy}.

"Mine would have been dull," said {n}. "And mine would have fallen over," said {f}.
They learned that what is hard for one can be easy for two.
The next year they did not even ask. They just began together.
"""
