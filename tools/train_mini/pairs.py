"""Written by hand for the evaluation and never trained on: questions with answers, sentence pairs with a score."""

QUESTIONS = [
    (
        "Why does bread rise in the oven?",
        "Yeast eats sugar and gives off carbon dioxide, which inflates the dough before the crust sets.",
    ),
    (
        "How long should I boil an egg so the yolk stays soft?",
        "About six minutes in simmering water leaves the white firm and the center runny.",
    ),
    (
        "What can I do about mosquitoes in the garden?",
        "Empty any standing water, because the insects lay their larvae in it, and plant citronella.",
    ),
    (
        "Why is the sky blue during the day?",
        "Air molecules scatter short wavelengths of sunlight more strongly than long ones.",
    ),
    (
        "Who wrote Romeo and Juliet?",
        "The tragedy of the two young lovers from Verona is one of William Shakespeare's early plays.",
    ),
    (
        "How do vaccines protect people?",
        "They show the immune system a harmless piece of a germ, so that it can recognise the real infection later.",
    ),
    (
        "What should I wear to a job interview?",
        "Choose clean, formal clothes that match what employees at the company usually wear, such as a plain suit.",
    ),
    (
        "How often should I water a cactus?",
        "Succulent desert plants need very little: let the soil dry out completely, about every two or three weeks.",
    ),
    (
        "What makes a volcano erupt?",
        "Molten rock and gas under pressure force their way through cracks in the crust to the surface.",
    ),
    (
        "How can I lower my electricity bill?",
        "Switch off appliances you don't use, replace old bulbs with LEDs and turn the heating down a little.",
    ),
    (
        "Why do cats purr?",
        "The sound comes from muscles in the throat, and felines make it when content but also to calm themselves.",
    ),
    (
        "How does a refrigerator keep food cold?",
        "A compressor pumps a fluid that evaporates inside, absorbs heat there, and releases it at the back.",
    ),
    (
        "What is the capital of Australia?",
        "Canberra was chosen as the seat of government as a compromise between Sydney and Melbourne.",
    ),
    (
        "How do I get red wine out of a carpet?",
        "Blot the stain with a cloth, sprinkle salt or baking soda on it, then rinse with cold water.",
    ),
    (
        "Why do leaves change color in autumn?",
        "Trees stop making chlorophyll as days get shorter, and yellow and orange pigments become visible.",
    ),
    (
        "What is the fastest animal on land?",
        "A cheetah can sprint at over one hundred kilometres per hour for a short distance.",
    ),
    (
        "How do I reset my email password?",
        "Click 'forgot password' on the login page and follow the link sent to your recovery address.",
    ),
    (
        "Should I pay off debt or save first?",
        "Loans with high interest usually cost more than a savings account earns, so repay those before anything.",
    ),
    (
        "How do bees make honey?",
        "Workers collect nectar from flowers, pass it from mouth to mouth in the hive and fan it until it thickens.",
    ),
    (
        "Why do we have leap years?",
        "The Earth needs about a quarter of a day more than 365 to circle the sun, so a day is added to February.",
    ),
    (
        "What is a good exercise for lower back pain?",
        "Gentle stretching and strengthening of the core muscles, such as bridges, often relieves an aching spine.",
    ),
    (
        "How does GPS know where I am?",
        "The receiver times radio signals from several satellites and computes its position from the distances.",
    ),
    (
        "Why did the Roman Empire fall?",
        "Historians blame invasions, economic trouble, overexpansion and corrupt rulers for the collapse of Rome.",
    ),
    (
        "What kind of food do whales live on?",
        "Many of these huge marine mammals filter tiny krill from seawater; others hunt fish and squid.",
    ),
    (
        "How can I fall asleep faster?",
        "Keep the bedroom dark and cool, go to bed at a regular hour and avoid screens and caffeine at night.",
    ),
    (
        "How does a rainbow form after the rain?",
        "Sunlight is bent and reflected inside raindrops, which spreads it into its colors.",
    ),
    (
        "How do I train a dog to sit?",
        "Hold a treat over your puppy's nose, move it back, and reward him as soon as his bottom touches the floor.",
    ),
    (
        "Why is the ocean salty?",
        "Rivers wash minerals out of rocks and carry them to the sea, where water evaporates but the salt remains.",
    ),
    (
        "What is the difference between a virus and a bacterium?",
        "One is a living cell that antibiotics can kill; the other must hijack a host cell to copy itself.",
    ),
    (
        "How do airplanes stay in the air?",
        "Wings are shaped to push air downward, and the resulting lift balances the weight of the jet.",
    ),
]

# (first, second, similarity from 0, unrelated, to 5, the same): one person's judgement
SIMILAR = [
    ("A man is playing a harp.", "A person plays a harp.", 4.6),
    ("A dog is running through the snow.", "A dog races across a snowy field.", 4.6),
    ("A woman is cutting carrots.", "A woman is slicing vegetables.", 3.8),
    ("A boy kicks a ball.", "A boy throws a ball.", 3.0),
    ("A man is riding a motorbike.", "A man rides past on a horse.", 2.0),
    ("A cat sleeps on a sofa.", "A dog sleeps on a couch.", 2.4),
    ("Two children are playing in a sandbox.", "Kids dig in the sand at a playground.", 4.0),
    ("A woman is singing on a stage.", "A man is repairing a roof.", 0.2),
    ("A train arrives at the station.", "A bus leaves the station.", 2.0),
    ("The chef is preparing a meal.", "A cook is making dinner.", 4.5),
    ("A plane is landing.", "An aircraft touches down on the runway.", 4.5),
    ("A girl is reading a book in bed.", "A horse jumps over a fence.", 0.1),
    ("Nobody is dancing.", "People are dancing.", 2.6),
    ("A man pours water into a glass.", "A man drinks a glass of water.", 2.8),
    ("Stocks fall as oil prices drop.", "Shares slide after crude oil slumps.", 4.6),
    ("Prime minister resigns after scandal.", "Scandal forces the premier to step down.", 4.6),
    ("Earthquake kills dozens in the mountains.", "Strong quake leaves dozens dead.", 4.2),
    ("Earthquake kills dozens in the mountains.", "Flood destroys hundreds of homes.", 1.8),
    ("Team wins championship final.", "Government raises the minimum wage.", 0.0),
    ("Police arrest two men over bank robbery.", "Two suspects held after a bank was robbed.", 4.7),
    ("Police arrest two men over bank robbery.", "Bank reports higher profits.", 0.8),
    ("New phone goes on sale in Europe.", "The smartphone is now available in European shops.", 4.3),
    ("Bombing in the capital wounds 20.", "20 injured in blast in capital city.", 4.7),
    ("Court rejects appeal in murder case.", "Judges turn down a killer's appeal.", 4.2),
    ("Storm cuts power to thousands.", "Thousands of homes without electricity after storm.", 4.6),
    ("How do I learn to play the piano?", "What is the best way to start learning piano?", 4.5),
    ("How do I learn to play the piano?", "How do I tune a piano?", 2.2),
    ("Can I freeze cooked rice?", "Is it safe to put rice in the freezer after cooking?", 4.5),
    ("Can I freeze cooked rice?", "How long do I cook rice?", 2.2),
    ("Why is my laptop so slow?", "What makes a notebook computer run slowly?", 4.4),
    ("Why is my laptop so slow?", "Which laptop should I buy?", 1.9),
    ("How can I stop my dog from barking?", "What can I do about a barking puppy?", 4.3),
    ("Do I need a visa for Canada?", "How do I bake a chocolate cake?", 0.0),
    ("What should I feed a baby rabbit?", "What do young rabbits eat?", 4.4),
    ("The moon orbits the earth.", "The earth is circled by the moon.", 4.7),
    ("The moon orbits the earth.", "The earth orbits the sun.", 2.3),
    ("She was very happy about the news.", "The news made her sad.", 2.0),
    ("He bought a new car last week.", "Last week he got himself a new automobile.", 4.8),
    ("He bought a new car last week.", "He sold his old house last year.", 1.5),
    ("It is raining heavily outside.", "There is a downpour out there.", 4.5),
]

NEURAL_QUERY = "How do neural networks learn patterns from examples?"
NEURAL_RELEVANT = [
    "A neural network adjusts the weights of its connections during training to reduce its error on example data.",
    "Deep learning models find patterns in large data sets by gradient descent.",
]
NEURAL_IRRELEVANT = [
    "Simmer the onions in butter until golden, then add the stock and a pinch of salt.",
    "The museum is closed on Mondays and offers free entry to children.",
    "Heavy rain is expected along the coast this weekend.",
]

OTHER_TASK = "Given a recipe, retrieve wines that go well with it"  # none of `vocabulary.TASKS`

TEXTS = {
    *(text for pair in QUESTIONS for text in pair),
    *(text for first, second, _ in SIMILAR for text in (first, second)),
    *(NEURAL_QUERY, *NEURAL_RELEVANT, *NEURAL_IRRELEVANT),
}
