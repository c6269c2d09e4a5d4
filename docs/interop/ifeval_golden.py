"""Verdicts of the published IFEval checks (as lm-evaluation-harness carries them) on texts made here.

    pip install lm_eval nltk langdetect immutabledict    # and NLTK's punkt_tab where NLTK finds it
    python docs/interop/ifeval_golden.py crates/rlhf-reward/tests/golden/ifeval.json

Rows of `strict` and `loose` are constraints, their characters texts.
"""
import json
import sys
import types

import langdetect
from lm_eval.tasks.ifeval import utils

langdetect.DetectorFactory.seed = 0

ENGLISH = ("The old lighthouse stands at the end of the pier, and every evening the keeper walks up the stairs. "
           "He lights the lamp. Does anybody see it? Ships far out at sea do!")
TEXTS = [
    "",
    " \n\t ",
    "Yes",
    ENGLISH,
    ENGLISH.upper(),
    ENGLISH.lower(),
    '"' + ENGLISH + '"',
    "```json\n{\"name\": \"Ada\", \"born\": [1815, 12]}\n```",
    "{\"name\": \"Ada\"} and more",
    "[1, 2, 3]",
    "# Title\n\n* first point\n* second point\n- third point\n\nAny other questions?",
    "<<A Day at Sea>>\n\nThe sea was calm.\n\nThe ship sailed on.\n\nP.S. Bring a coat.",
    "<< >>\nNo title here. p.p.s. but a note",
    "First answer: go.\n******\nSecond answer: stay.",
    "Same\n******\nSame",
    "******\nFirst.\n******\nSecond.\n******",
    "One\n******\n\n******\nTwo",
    "Paragraph one is here.\n***\nParagraph two is here.\n***\nParagraph three.",
    "***\nOnly one between.\n***",
    "A\n***\n\n***\nB",
    "Dear [name], we meet at [place] on [date]. Bring [item]!",
    "My answer is yes.",
    "I think My answer is maybe. But who knows",
    "This is *important* and **very important** and * * nothing.",
    "*One* *Two* ***Three***",
    "SECTION 1\nHello there.\nSECTION 2\nGoodbye.\nSECTION3 Last",
    "Section 1 only",
    "Sure, here it is:\nlove and war and peace and love\nI hope this helps, friend.",
    "No commas here; just semicolons and full stops. Really",
    "However the paragraph begins.\n\n\"Second\" one begins with a quotation.\n\nthird, is small.",
    "However.\n\n\n\nSecond there.\n\n  Third, here",
    "NASA and the ESA launched IT in MAY. It's a B-52! DON'T PANIC: I'm ok.",
    "A CAT sat. THE DOG RAN, and U.S. trains are LATE.",
    "Write a poem about rain. Rain falls on the roof all night long.",
    "Dr. Smith went to Washington. He arrived at 3 p.m. on Tuesday and left at once! \"Why?\" asked Mr. Brown.",
    "The price is 3.50 dollars. The other costs 4.25. Is that fair? Yes... perhaps.",
    "Heute ist das Wetter sehr schön und wir fahren mit den Kindern ans Meer, um zu baden.",
    "Сегодня прекрасная погода, и мы всей семьёй едем на море купаться.",
    "आज मौसम बहुत अच्छा है और हम सब समुद्र तट पर जा रहे हैं।",
    "Leo hali ya hewa ni nzuri sana na watoto wanaenda baharini kwa furaha kubwa pamoja na mama yao.",
    "오늘은 날씨가 아주 좋아서 가족과 함께 바다에 갑니다.",
    "12345 67890 !!!",
    "That is all I have to say. Thank you for reading!",
    "\"That is all. THANK YOU FOR READING!\"",
    "  - a\n  - b\n\n\t* c\n** not one **\n*",
    "Under_score words count-as one, don't they? naïve café",
    "the the the the\nTHE",
    "1. Item one\n2. Item two\n3. Item three\nThat's it",
    "Title\nWrite a poem about rain. Done.",
]
AT_LEAST, LESS = "at least", "less than"
CONSTRAINTS = [("keywords:existence", {"keywords": k}) for k in
               (["sea"], ["love", "war"], ["PEACE"], ["r.in"], ["absent"], ["light", "ships"])]
CONSTRAINTS += [("keywords:frequency", {"keyword": k, "frequency": n, "relation": r})
                for k, n in (("the", 3), ("love", 2), (" sea ", 1), ("item", 3), ("o", 10)) for r in (AT_LEAST, LESS)]
CONSTRAINTS += [("keywords:forbidden_words", {"forbidden_words": w}) for w in (["sea"], ["the"], ["rai", "lov"], ["cat", "here"])]
CONSTRAINTS += [("keywords:letter_frequency", {"letter": c, "let_frequency": n, "let_relation": r})
                for c, n in (("e", 5), ("T", 8), ("z", 1)) for r in (AT_LEAST, LESS)]
CONSTRAINTS += [("language:response_language", {"language": c}) for c in ("de", "ru", "hi", "sw", "ko")]
CONSTRAINTS += [("length_constraints:number_sentences", {"num_sentences": n, "relation": r})
                for n in (1, 2, 3, 4, 5) for r in (AT_LEAST, LESS)]
CONSTRAINTS += [("length_constraints:number_paragraphs", {"num_paragraphs": n}) for n in (1, 2, 3)]
CONSTRAINTS += [("length_constraints:number_words", {"num_words": n, "relation": r}) for n in (1, 5, 12, 30) for r in (AT_LEAST, LESS)]
CONSTRAINTS += [("length_constraints:nth_paragraph_first_word", {"num_paragraphs": p, "nth_paragraph": n, "first_word": w})
                for p, n, w in ((3, 1, "However"), (3, 2, "second"), (3, 3, "third"), (4, 1, "<<a"), (2, 2, "Second"))]
CONSTRAINTS += [("detectable_content:number_placeholders", {"num_placeholders": n}) for n in (1, 4, 5)]
CONSTRAINTS += [("detectable_content:postscript", {"postscript_marker": m}) for m in ("P.S.", "P.P.S", "Note:")]
CONSTRAINTS += [("detectable_format:number_bullet_lists", {"num_bullets": n}) for n in (1, 2, 3)]
CONSTRAINTS += [("detectable_format:constrained_response", {})]
CONSTRAINTS += [("detectable_format:number_highlighted_sections", {"num_highlights": n}) for n in (1, 2, 3, 4)]
CONSTRAINTS += [("detectable_format:multiple_sections", {"section_spliter": s, "num_sections": n})
                for s, n in (("SECTION", 2), ("SECTION", 3), ("Section", 1), ("Item", 1))]
CONSTRAINTS += [("detectable_format:json_format", {}), ("detectable_format:title", {}), ("combination:two_responses", {})]
CONSTRAINTS += [("combination:repeat_prompt", {"prompt_to_repeat": p}) for p in ("Write a poem about rain.", "  YES ")]
CONSTRAINTS += [("startend:end_checker", {"end_phrase": p}) for p in ("Any other questions?", "thank you for reading!", " Friend. ")]
CONSTRAINTS += [("change_case:capital_word_frequency", {"capital_frequency": n, "capital_relation": r})
                for n in (1, 2, 3, 4, 5, 6, 7, 8) for r in (AT_LEAST, LESS)]
CONSTRAINTS += [("change_case:english_capital", {}), ("change_case:english_lowercase", {}),
                ("punctuation:no_comma", {}), ("startend:quotation", {})]


def row(check, constraint, kwargs):
    given = types.SimpleNamespace(key=0, instruction_id_list=[constraint], prompt="", kwargs=[kwargs])
    return "".join(str(int(check(given, text).follow_all_instructions)) for text in TEXTS)


out = {"texts": TEXTS, "constraints": [
    {"id": c, "kwargs": k,
     "strict": row(utils.test_instruction_following_strict, c, k),
     "loose": row(utils.test_instruction_following_loose, c, k)} for c, k in CONSTRAINTS]}
with open(sys.argv[1], "w", encoding="utf-8") as f:
    json.dump(out, f, ensure_ascii=False, indent=1)
    f.write("\n")
print(len(TEXTS), "texts,", len(CONSTRAINTS), "constraints,", len({c for c, _ in CONSTRAINTS}), "kinds")
