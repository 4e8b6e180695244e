"""Everyday sentences written by template: captions, headlines, how-to and forum questions, questions about words.

Dictionaries and manuals say little about a man playing a guitar or a minister resigning; what people compare with one
another often does. A generated sentence need not be true, only plausible English: the teacher says where it lies.
"""

import random

# Forms for a word of WordNet: {w} the word, {W} with a capital, {a} with an article before it, {m} its meaning,
# {s} another word for it, {o} some other word of its kind.
DEFINING = (
    "What is {w}?", "{w}: {m}", "What does {w} mean?", "{W} is {m}.", "Which word means {m}?", "Define {w}.",
    "Tell me about {w}.", "{w} ({s})", "Who or what is {w}?", "the meaning of {w}",
)  # fmt: skip
ASKING = (
    "How does {a} work?", "Where can I find {w}?", "Why is {w} important?", "How much does {a} cost?",
    "What is the difference between {w} and {o}?", "What causes {w}?", "How do I choose {a}?", "the history of {w}",
    "How many kinds of {w} are there?", "What does {a} look like?", "I would like to know more about {w}.",
    "They talked about {w} and {o} for hours.", "She wrote an article about {w}.", "Is {w} good or bad?",
    "What are some examples of {w}?", "Who came up with the idea of {w}?", "What can I do about {w}?",
    "We never had {a} before.", "Why do people want {w}?", "When was {w} first described?",
)  # fmt: skip
ASKING_OF = {
    4: ("How do I get better at {w}?", "What do I need for {w}?", "Is {w} allowed?", "Why do people enjoy {w}?"),
    5: ("What do {w} eat?", "Where does {a} live?", "How long does {a} live?", "How do I take care of {a}?",
        "{a} was sleeping under the tree.", "Are {w} and {o} related?"),
    6: ("What is {a} used for?", "How do I clean {a}?", "Who invented the {w}?", "How do I repair a broken {w}?",
        "He bought {a} and a {o} at the shop.", "The {w} stands next to the {o}."),
    8: ("Why does my {w} hurt?", "What does the {w} do?", "How do doctors treat an injured {w}?"),
    12: ("How do I deal with {w}?", "Why do we feel {w}?", "He was full of {w}."),
    13: ("How do you make {w}?", "What goes well with {w}?", "Is {w} healthy?", "How long does {w} keep?",
         "We had {w} and {o} for dinner.", "a recipe for {w}"),
    14: ("Who belongs to the {w}?", "How is {a} organized?"),
    15: ("Where is {w}?", "What is the weather like in {w}?", "How do I get to {w}?", "a map of {w}",
         "They moved from {w} to {o}."),
    17: ("Where is {w}?", "How big is {w}?", "How did {w} form?"),
    18: ("What does {a} do?", "How do I become {a}?", "Who was {w}?", "What is {w} famous for?",
         "The {w} talked to the {o}."),
    20: ("How do I grow {w}?", "Can you eat {w}?", "When does {w} flower?", "How often should I water {a}?"),
    22: ("How does {w} take place?", "What are the stages of {w}?"),
    26: ("What are the symptoms of {w}?", "How is {w} treated?", "How can I avoid {w}?"),
    27: ("What is {w} made of?", "Is {w} poisonous?", "What is {w} used for?"),
    28: ("What happened during {w}?", "How long is {a}?"),
}  # fmt: skip
NOUNS = range(3, 29)  # WordNet's numbers for the kinds of nouns

PEOPLE = """a man|a woman|a boy|a girl|two men|two women|a child|a young woman|an old man|a group of people
three children|a baby|a couple|a player|a chef|a farmer|a doctor|a teacher|a musician|a dancer|a cyclist|a runner
a soldier|a worker|a police officer|a student|an elderly woman|a crowd of people|several kids|a family|a tourist
a skier|a surfer|a small dog|a brown dog|two dogs|a cat|a black cat|a kitten|a horse|a bird|a monkey|a panda
an elephant|a cow|a sheep|the people|someone|a person|a lady|a guy|a toddler|a football player|a skateboarder
a fisherman|a street vendor"""
DOING = """playing a guitar|playing the piano|playing the flute|playing the drums|riding a horse|riding a bike
slicing onions|slicing a tomato|cutting a potato|peeling a carrot|cooking rice|frying an egg|pouring oil into a pan
mixing ingredients in a bowl|eating a banana|eating a slice of pizza|drinking water|drinking coffee
running through a field|running along the beach|jumping into a pool|jumping over a fence|swimming in a lake
climbing a rock wall|climbing a tree|walking down the street|walking a dog|crossing the road|driving a car
fixing a motorcycle|washing the dishes|reading a book|reading a newspaper|writing a letter|talking on the phone
looking at a phone|singing a song|dancing on a stage|taking a photo|painting a wall|building a sandcastle
throwing a ball|catching a frisbee|kicking a soccer ball|playing basketball|playing chess|playing cards
lying on the couch|sleeping on a bed|sitting on a bench|standing on the sidewalk|waiting for a bus
getting off a train|shopping at a market|carrying a bag|holding a baby|feeding a dog|brushing a cat|combing her hair
putting on makeup|doing a trick on a skateboard|skiing down a hill|surfing a wave|paddling a canoe|rowing a boat
lifting weights|doing push-ups|shooting a gun|firing a bow and arrow|chopping wood|mowing the lawn|planting flowers
opening a box|wrapping a present|laughing|crying|smiling at the camera|waving|clapping|talking|arguing|kissing
hugging|working on a laptop|typing on a keyboard|chewing on a stick|barking at a stranger|chasing a ball
looking out of a window|flying over the water|eating grass|drinking milk"""
WHERE = """in the park|on the beach|in the kitchen|on a stage|in the snow|in front of a building|at night|in the rain
near a river|on a mountain|in a crowded street|at a restaurant|in a garden|on the grass|in a classroom
at the airport|in a stadium|in the living room|on a boat|under a tree|next to a car|by the sea|in the desert
in a forest|on a busy road|at the zoo|outside|||||||||"""
LOOK = """wearing a red shirt|in a blue jacket|with a hat|with long hair|in a white dress|wearing sunglasses|in a suit
wearing a helmet|in black|with a backpack||||||||||||||||||"""
COUNTRY = """China|Russia|India|Iran|Israel|Syria|Egypt|Ukraine|France|Germany|Britain|Japan|South Korea|North Korea
Pakistan|Afghanistan|Iraq|Turkey|Mexico|Brazil|Spain|Italy|Greece|Nigeria|Kenya|South Africa|Australia|Canada|Poland
Thailand|the US|Indonesia|Venezuela|Cuba|Libya|Lebanon|Bangladesh|Vietnam|Argentina|Sweden|Switzerland
the European Union|California|Texas"""
WHO = """president|prime minister|foreign minister|government|court|police|army|central bank|opposition leader
parliament|finance minister|officials|lawmakers|protesters|rebels|scientists|doctors|workers|voters|judges|airline
company|shares"""
NEWS = """rejects peace talks|calls for a ceasefire|resigns after a corruption scandal|warns of new sanctions
wins the election|dies at the age of 89|to cut interest rates|raises taxes on fuel|signs a trade deal
arrested on charges of fraud|denies the allegations|killed in a car bomb attack|injured in a train crash
accuses neighbours of spying|to close hundreds of schools|announces new budget|faces trial for murder
agrees to release prisoners|urges calm after riots|clash with security forces|vows to fight terrorism
reports record profits|fall sharply on growth fears|rise on strong earnings|to cut thousands of jobs
recalls millions of cars|approves new vaccine|bans smoking in public places|hit by a powerful earthquake
evacuated as floods spread|launches a rocket into space|suspends flights after a plane crash
kills dozens in an air strike|delays a vote on the constitution|opens talks on nuclear programme
defends plan to spy on phone calls|bans former champion for doping|beats rivals to win the world cup
hold first talks in years|sues technology giant over patents|finds no evidence of wrongdoing
blames storm for power cuts|hopes for progress on climate deal"""
TASK = """learn a new language|lose weight|cook rice|remove a coffee stain|fix a leaking tap|train a puppy
write a resume|find a cheap flight|open a bank account|save money for retirement|grow tomatoes|sleep better
quit smoking|boil an egg|change a tire|bake bread without yeast|make friends in a new city
prepare for a job interview|get rid of ants|clean a cast iron pan|tie a tie|learn to play the guitar
speed up an old computer|recover deleted photos|reset a password|delete an account|invest in stocks
store fresh herbs|treat a sunburn|stop a nosebleed|paint a room|sharpen a knife|unclog a drain
remove a scratch from a car|teach a child to read|improve my memory|write a novel|run a marathon|stay motivated
start a small business|make money online|choose a laptop|set up a printer|write a cover letter|ask for a raise
get a visa|apply for a passport|convert a file to PDF|sort a list in Python|undo a git commit|parse JSON
connect to a database|install Linux|back up a phone|block a website|substitute butter in a cake|cook a steak
keep bread fresh|freeze soup|make a sauce thicker|roast vegetables|cut an onion|cite a website
solve a quadratic equation|measure blood pressure|lower cholesterol|cure a headache|prevent the flu|buy a house"""
HOW = """How do I {t}?|How can I {t}?|What is the best way to {t}?|Is it possible to {t}?|Can you explain how to {t}?
Tips to {t}|How long does it take to {t}?|What do I need to {t}?|Should I {t} myself?
I want to {t} but don't know where to start.|What are some easy ways to {t}?|How to {t} at home
What is the fastest way to {t}?|Why is it so hard to {t}?|Do I need help to {t}?|It is a good idea to {t}.
You can {t} if you follow a few simple steps.|The simplest way to {t} is to ask someone who knows.
My friend told me not to {t}.|There are many ways to {t}.|Never {t} when you are tired.|It took me weeks to {t}."""
THING = """the moon|the sun|gravity|photosynthesis|inflation|a black hole|the immune system|the heart|the brain
a neural network|machine learning|a vaccine|an earthquake|a volcano|the ocean|the internet|electricity|a battery
a solar panel|a car engine|an airplane|a credit card|a mortgage|the stock market|democracy|the constitution
evolution|DNA|a virus|bacteria|cancer|diabetes|the weather|a hurricane|climate change|the ozone layer|a rainbow
lightning|a magnet|sound|light|an atom|a microwave oven|a refrigerator|a computer|an operating system|a database
encryption|a search engine|deep learning|an algorithm|a compiler|a web browser|bitcoin|sleep|memory|coffee|bread
cheese|wine|chocolate|a piano|a violin|jazz|the Olympics|football|chess|a bicycle|a train|a submarine
the Roman Empire|the Second World War|the French Revolution|the pyramids|a whale|a bee|a spider|a tree|a seed
the water cycle"""
ASK = """How does {x} work?|What is {x}?|Why is {x} important?|Who discovered or invented {x}?|What causes {x}?
When did {x} begin?|What are the parts of {x}?|How do scientists study {x}?|What would happen without {x}?
Where can I read more about {x}?|Is {x} dangerous?|How much does {x} cost?|Explain {x} in simple words
What is the history of {x}?|What is {x} made of?|How is {x} different from {y}?|Which is better, {x} or {y}?
A book about {x} and {y}|He knows a lot about {x}.|Researchers have learned something new about {x}.
Children are often curious about {x}.|{x} and {y} have little in common."""
OPINION = """I think {x} is overrated.|I really enjoyed reading about {x} last {d}.|She gave a talk on {x} on {d}.
We will discuss {x} next {d} at {n} o'clock.|The lesson on {x} starts at {n}:30.
They spent {n} hours talking about {x}.|There are {n} reasons to care about {x}.
It was {n} degrees on {d}, perfect for learning about {x}."""
DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"


def options(lines: str) -> list[str]:
    return [part.strip() for line in lines.split("\n") for part in line.split("|")]


def generate(count: int, seed: int = 7) -> list[str]:
    """`count` sentences, some of them twice; the same for the same count and seed."""
    pick = random.Random(seed)
    people, doing, where, look = options(PEOPLE), options(DOING), options(WHERE), options(LOOK)
    country, who, news = options(COUNTRY), options(WHO), options(NEWS)
    task, how, thing, ask, opinion, days = (options(s) for s in (TASK, HOW, THING, ASK, OPINION, DAYS))
    made = []
    for _ in range(count):
        kind = pick.random()
        x, y = pick.choice(thing), pick.choice(thing)
        if kind < 0.35:
            person = pick.choice(people)
            plural = person.split()[0] in ("two", "three", "several") or person == "the people"
            verb = pick.choice(["are" if plural else "is"] * 4 + [""])
            if pick.random() < 0.06:
                verb += " not"
            words = [person, pick.choice(look), verb, pick.choice(doing), pick.choice(where)]
            sentence = " ".join(word.strip() for word in words if word)
            sentence += pick.choice([".", ".", ""])
        elif kind < 0.55:
            place = pick.choice(country)
            sentence = pick.choice([f"{place} {pick.choice(who)} {pick.choice(news)}",
                                    f"{pick.choice(who)} in {place} {pick.choice(news)}",
                                    f"{place} {pick.choice(news)}", f"{pick.choice(news)}: {place}"])  # fmt: skip
        elif kind < 0.75:
            sentence = pick.choice(how).format(t=pick.choice(task))
        elif kind < 0.93:
            sentence = pick.choice(ask).format(x=x, y=y)
        else:
            sentence = pick.choice(opinion).format(x=x, d=pick.choice(days), n=pick.randint(2, 60))
        made.append(sentence[0].upper() + sentence[1:])
    return made
