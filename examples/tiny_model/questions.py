"""Everyday questions for the bundled model's training: a small grammar around one topic."""

from __future__ import annotations

import random
from typing import Final

from lexicon import TOPICS

_ASK: Final = """How can I improve my @?
How do I choose the right @?
How should I handle the @?
How do I take care of my @?
How can I learn more about the @?
How do I explain a @ to my family?
How would you describe the perfect @?
How long does it take to prepare a @?
How do people in other places use their @?
How can I get a better @ for less money?
How often should I check the @?
What is the best way to deal with the @?
What do you think about the @?
What should I know about the @?
What is your opinion on the @?
What makes a good @?
What can go wrong with a @?
What should I say about the @?
What would you do with an old @?
What is so special about the @?
What do you expect from the @?
What happens if I lose the @?
Which @ would you recommend?
Which @ is right for somebody like me?
Why do people care so much about the @?
Why does my @ never work?
Why is the @ so difficult?
Is the @ worth the trouble?
Is it normal to dislike the @?
Should I be worried about the @?
Should I sell my @?
Can you tell me about the @?
Can you help me with the @?
Could you give me some advice on the @?
Could you explain the @ to me?
Please tell me what you know about the @.
Please help me find a @.
Where can I find a good @?
When is the best moment to change the @?
Who knows most about the @?
Do you like the @?
Do I really need a @?
Tell me something about the @.
Give me your honest view of the @.
I need a @. Any ideas?
Let us talk about the @.
Would you like to hear about my @?""".splitlines()

_SITUATION: Final = """My friend does not like my @.
My brother always talks about the @.
Somebody took my @ yesterday.
I bought a new @ last week.
I forgot the @ again.
I am proud of my @.
I am nervous about the @.
I lost my @ on the way here.
I think my @ is the best in the world.
I believe that the @ is a waste of time.
I had a bad day because of the @.
Someone in my family broke the @.
I have never seen such a @.
There is a problem with the @.
My partner and I cannot agree on the @.
I am sure that I am right about the @.
I worked on the @ for years.
A stranger asked me about the @.""".splitlines()

_FOLLOW_UP: Final = """What should I do?
What do you think?
Any advice?
How should I react?
What now?
Do you agree?
Am I right?
What would you do?
Is it a good idea?
What does that mean for me?
How do you see it?
What can I expect?
Could you help me?
What comes next?""".splitlines()


def everyday_question(rng: random.Random) -> str:
    """Return a question about a random topic."""
    topic = rng.choice(TOPICS)
    if rng.random() < 0.6:
        return rng.choice(_ASK).replace("@", topic)
    situation = rng.choice(_SITUATION).replace("@", topic)
    return f"{situation} {rng.choice(_FOLLOW_UP)}"
