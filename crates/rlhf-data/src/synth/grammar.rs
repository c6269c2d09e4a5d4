//! The fixed texts of the customer-help task: what customers ask, what a good answer says, and what
//! goes wrong in a bad one.
//!
//! Placeholders are `{name}`, `{order}`, `{product}`, `{city}` and `{day}`. Each is preceded by a
//! blank, so that a slot has the same tokens in the question as in the reply.
//!
//! Invariant: every answer of an intent holds one of that intent's key phrases and all slots the
//! intent needs, and no other intent's key phrase.

/// A kind of fact that a customer states and a reply must repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// The customer's first name.
    Name,
    /// An order number such as `K48`.
    Order,
    /// A product.
    Product,
    /// A city.
    City,
    /// A weekday.
    Day,
}

impl Slot {
    /// Every slot, in the order of the data's columns.
    pub const ALL: [Self; 5] = [
        Self::Name,
        Self::Order,
        Self::Product,
        Self::City,
        Self::Day,
    ];

    /// The name of the data column and, in braces, of the placeholder.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Order => "order",
            Self::Product => "product",
            Self::City => "city",
            Self::Day => "day",
        }
    }

    pub(crate) fn placeholder(self) -> &'static str {
        match self {
            Self::Name => "{name}",
            Self::Order => "{order}",
            Self::Product => "{product}",
            Self::City => "{city}",
            Self::Day => "{day}",
        }
    }
}

/// Which products an intent may be about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goods {
    /// Any product.
    Any,
    /// Only [`super::lexicon::THINGS`].
    Things,
    /// Only [`super::lexicon::CLOTHES`].
    Clothes,
}

/// Something a customer can ask.
#[derive(Debug)]
pub struct Intent {
    /// The value of the `intent` column.
    pub id: &'static str,
    /// The slots that a reply must repeat.
    pub needs: &'static [Slot],
    /// Which products fit.
    pub goods: Goods,
    /// The phrases of which a reply must hold one: they say that the asked thing is done or answered.
    pub keys: &'static [&'static str],
    /// What the customer writes.
    pub questions: &'static [&'static str],
    /// What a good reply says.
    pub answers: &'static [&'static str],
}

use Slot::{City, Day, Order, Product};

/// All intents.
pub const INTENTS: &[Intent] = &[
    Intent {
        id: "order_status",
        needs: &[Order, Product],
        goods: Goods::Any,
        keys: &["is on its way", "has left our warehouse"],
        questions: &[
            "Where is my order {order} with the {product}?",
            "I ordered the {product} under number {order} and it has not come yet. Where is it?",
            "Can you tell me when order {order} with the {product} will get here?",
            "I am still waiting for the {product} from order {order}. Has it been sent?",
            "What is the status of order {order}? I am waiting for the {product}.",
            "My {product} has not arrived. The order number is {order}.",
        ],
        answers: &[
            "Your {product} from order {order} is on its way and should arrive in two days.",
            "Order {order} has left our warehouse, so the {product} will reach you soon.",
            "The parcel with your {product} is on its way, and you can follow it with order number {order}.",
            "I checked order {order} and the {product} has left our warehouse this morning.",
            "Good news, order {order} is on its way and the driver will bring the {product} tomorrow.",
            "The {product} has left our warehouse, and order {order} will be at your door this week.",
        ],
    },
    Intent {
        id: "return_item",
        needs: &[Order, Product],
        goods: Goods::Any,
        keys: &["return label", "send it back for free"],
        questions: &[
            "How can I return the {product} from order {order}?",
            "I do not like the {product} that came with order {order}. Can I send it back?",
            "I would like to give back the {product}. My order number is {order}.",
            "The {product} from order {order} is not what I wanted. How do I return it?",
            "Can I still return order {order}? It is about the {product}.",
            "Please tell me how to send back the {product} of order {order}.",
        ],
        answers: &[
            "I have emailed you a return label for the {product} from order {order}.",
            "You can put the {product} in its box and send it back for free with order number {order} on top.",
            "Just put the return label on the {product} and add a note with order number {order}.",
            "The return label for order {order} is in your inbox, so you can post the {product} today.",
            "For order {order} you have thirty days, so pack the {product} and send it back for free.",
            "We will gladly take back the {product}, and the return label for order {order} comes by email.",
        ],
    },
    Intent {
        id: "refund_status",
        needs: &[Order],
        goods: Goods::Any,
        keys: &["your refund was sent", "money will be in your account"],
        questions: &[
            "When do I get my refund for order {order}?",
            "I sent back order {order} two weeks ago. Where is my money?",
            "Has the refund for order {order} been paid?",
            "I am waiting for my refund. The order number is {order}.",
            "Could you check the refund for order {order}?",
            "I returned my order {order} but I see no money in my bank.",
        ],
        answers: &[
            "For order {order} your refund was sent today, and the bank needs three days.",
            "The money will be in your account within five days, as order {order} came back safely.",
            "I checked order {order} and the money will be in your account by the end of the week.",
            "We got order {order} back and your refund was sent to your bank this morning.",
            "Order {order} is now closed, and the money will be in your account very soon.",
            "I can see that your refund was sent for order {order} and should show in two days.",
        ],
    },
    Intent {
        id: "change_address",
        needs: &[Order, City],
        goods: Goods::Any,
        keys: &["to your new address", "updated the address"],
        questions: &[
            "I have moved to {city}. Can you change the address of order {order}?",
            "Please send order {order} to my new flat in {city}.",
            "My order {order} should go to {city} and not to my old home.",
            "I gave the wrong address for order {order}. I live in {city} now.",
            "Can order {order} be sent to {city}? I moved last month.",
            "My new home is in {city}. Please update order {order}.",
        ],
        answers: &[
            "Order {order} will now go to your new address in {city}.",
            "I have updated the address of order {order}, and it will be sent to {city}.",
            "We will deliver order {order} to your new address in {city} this week.",
            "The driver has been told to bring order {order} to your new address in {city}.",
            "I updated the address, so order {order} will travel to {city}.",
            "It was easy to change, and order {order} goes to your new address in {city} tomorrow.",
        ],
    },
    Intent {
        id: "cancel_order",
        needs: &[Order, Product],
        goods: Goods::Any,
        keys: &["is now cancelled", "have cancelled"],
        questions: &[
            "Please cancel order {order}. I do not need the {product} any more.",
            "I want to cancel the {product} in order {order}.",
            "I found the {product} in a shop near me. Can you stop order {order}?",
            "Can you cancel my order {order}? I bought the {product} by mistake.",
            "Is it too late to cancel order {order} with the {product}?",
            "I ordered the {product} twice. Please cancel number {order}.",
        ],
        answers: &[
            "Order {order} is now cancelled and you will not be charged for the {product}.",
            "I have cancelled order {order}, so the {product} will not be shipped.",
            "We have cancelled the {product}, and you pay nothing for order {order}.",
            "As you asked, order {order} is now cancelled and the {product} stays with us.",
            "The {product} was not yet packed, so order {order} is now cancelled.",
            "We have cancelled order {order} in time, and the {product} stays in the warehouse.",
        ],
    },
    Intent {
        id: "warranty",
        needs: &[Product],
        goods: Goods::Things,
        keys: &["two year warranty", "repair it for free"],
        questions: &[
            "My {product} broke after six months. Is it covered?",
            "How long is the warranty for the {product}?",
            "Does the {product} have a warranty? It broke yesterday.",
            "The {product} I bought last year is broken. Can you fix it?",
            "Is there a guarantee on the {product}? I have had it for a year.",
            "Who will pay for the repair of my {product}?",
        ],
        answers: &[
            "The {product} comes with a two year warranty, so you pay nothing.",
            "Your {product} is still covered and our team will repair it for free.",
            "We give a two year warranty on the {product}, and yours is still valid.",
            "Bring the {product} to any shop and we will repair it for free.",
            "There is a two year warranty on your {product}, so we will fix it at once.",
            "Our experts will look at the {product} and repair it for free within ten days.",
        ],
    },
    Intent {
        id: "opening_hours",
        needs: &[City],
        goods: Goods::Any,
        keys: &["open from nine to six", "opens at nine"],
        questions: &[
            "When is your shop in {city} open?",
            "What are the opening hours of the store in {city}?",
            "I want to visit your shop in {city} this week. When can I come?",
            "Is the store in {city} open in the evening?",
            "Until when can I come to the shop in {city} today?",
            "I will be in {city} tomorrow. At what time do you open?",
        ],
        answers: &[
            "Our shop in {city} is open from nine to six every day.",
            "The shop in {city} opens at nine in the morning and closes at six.",
            "You can visit us in {city} any day, as the shop is open from nine to six.",
            "Our store in {city} opens at nine and you are welcome until six.",
            "The store in {city} is open from nine to six, and parking is free.",
            "We would love to see you in {city}, where the shop opens at nine each day.",
        ],
    },
    Intent {
        id: "exchange_size",
        needs: &[Order, Product],
        goods: Goods::Clothes,
        keys: &["in the right size", "in your size"],
        questions: &[
            "The {product} from order {order} is too small. Can I get a bigger one?",
            "I need another size of the {product} in order {order}.",
            "The {product} does not fit me. Can you exchange it? My order is {order}.",
            "My order {order} came today but the {product} is too big.",
            "Can I swap the {product} of order {order} for a larger size?",
            "I chose the wrong size for the {product}. The order number is {order}.",
        ],
        answers: &[
            "We will swap the {product} from order {order} for one in the right size.",
            "The {product} in your size will be sent as soon as order {order} comes back.",
            "I have put aside the {product} in the right size and linked it to order {order}.",
            "Order {order} has been changed, and the {product} in your size ships tomorrow.",
            "You will get the {product} in the right size at no extra cost with order {order}.",
            "We still have the {product} in your size and will add it to order {order}.",
        ],
    },
    Intent {
        id: "invoice_copy",
        needs: &[Order],
        goods: Goods::Any,
        keys: &["copy of the invoice", "emailed the invoice"],
        questions: &[
            "I need the invoice for order {order}.",
            "Can you send me the bill for order {order} again?",
            "I lost the receipt of order {order}. Can I have a copy?",
            "My office needs an invoice for order {order}.",
            "Please send me a copy of the bill. The order number is {order}.",
            "Where can I find the invoice of order {order}?",
        ],
        answers: &[
            "I have sent a copy of the invoice for order {order} to your inbox.",
            "We have just emailed the invoice of order {order} to you.",
            "You will find a copy of the invoice for order {order} in your email.",
            "I emailed the invoice for order {order}, and you can print it at home.",
            "A copy of the invoice for order {order} is ready in your account.",
            "Our team has emailed the invoice, so order {order} is ready for your records.",
        ],
    },
    Intent {
        id: "password_reset",
        needs: &[Order],
        goods: Goods::Any,
        keys: &["a reset link", "choose a new password"],
        questions: &[
            "I forgot my password and cannot see order {order}.",
            "I cannot log in to follow order {order}. How do I reset my password?",
            "My account is locked and I need to check order {order}.",
            "The site does not take my password. I want to look at order {order}.",
            "How can I get a new password? I need to see order {order}.",
            "I lost my login and cannot open order {order}.",
        ],
        answers: &[
            "I have sent you a reset link, and then you can see order {order} again.",
            "Open the page of order {order}, click on login and choose a new password.",
            "You will get a reset link by email so that you can open order {order}.",
            "To see order {order} again, use the link in your inbox and choose a new password.",
            "We unlocked your account, so choose a new password and look at order {order}.",
            "Use a reset link from the login page and order {order} will be there.",
        ],
    },
    Intent {
        id: "damaged_item",
        needs: &[Order, Product],
        goods: Goods::Any,
        keys: &["send a replacement", "a new one at no cost"],
        questions: &[
            "The {product} in order {order} arrived broken.",
            "My {product} came with a big scratch. The order number is {order}.",
            "I opened order {order} and the {product} was damaged. What can you do?",
            "The box of order {order} was crushed and the {product} is damaged.",
            "You sent me a damaged {product} in order {order}. I am not happy.",
            "The {product} from order {order} has a big scratch.",
        ],
        answers: &[
            "We will send a replacement for the {product} from order {order} today.",
            "You will get a new one at no cost, as the {product} in order {order} was damaged.",
            "I can send a replacement for order {order}, and you may keep the {product}.",
            "The {product} should not look like that, so order {order} brings you a new one at no cost.",
            "Keep the {product} from order {order}, for we will send a replacement tomorrow.",
            "I told the team about the {product}, and order {order} gets you a new one at no cost.",
        ],
    },
    Intent {
        id: "stock_check",
        needs: &[Product, City],
        goods: Goods::Any,
        keys: &["in stock", "ready to buy"],
        questions: &[
            "Do you have the {product} in your shop in {city}?",
            "Is the {product} available in {city}?",
            "Can I buy the {product} at the store in {city} today?",
            "I am looking for the {product}. Does the shop in {city} have it?",
            "I would like to see the {product} before I buy it. Does the store in {city} have it?",
            "Is the {product} still there in your store in {city}?",
        ],
        answers: &[
            "The {product} is in stock at our shop in {city}.",
            "Yes, our store in {city} has the {product} ready to buy.",
            "I checked for you and the {product} is in stock in {city} today.",
            "You will find the {product} ready to buy at the shop in {city}.",
            "We have the {product} in stock in {city} in three colours.",
            "The team in {city} has the {product} ready to buy and will show it to you.",
        ],
    },
    Intent {
        id: "gift_wrap",
        needs: &[Order, Product],
        goods: Goods::Any,
        keys: &["gift wrapped", "in gift paper"],
        questions: &[
            "Can you wrap the {product} from order {order} as a gift?",
            "My order {order} is a present. Please wrap the {product} nicely.",
            "I want to give the {product} to my mother. Can order {order} be gift wrapped?",
            "Is it possible to add gift paper to order {order}? The {product} is for a friend.",
            "Please pack the {product} of order {order} as a birthday gift.",
            "The {product} is for a wedding. Can you wrap order {order}?",
        ],
        answers: &[
            "The {product} from order {order} will be gift wrapped with a red ribbon.",
            "We will pack the {product} in gift paper and send order {order} tomorrow.",
            "Order {order} will be gift wrapped, and the {product} comes with a free card.",
            "I told the team to put the {product} of order {order} in gift paper.",
            "Of course the {product} will be gift wrapped, and order {order} costs no more.",
            "Your {product} is already in gift paper, so order {order} is ready to go.",
        ],
    },
    Intent {
        id: "delivery_day",
        needs: &[Order, Day],
        goods: Goods::Any,
        keys: &["new delivery day", "moved the delivery"],
        questions: &[
            "I am not at home this week. Can you bring order {order} on {day}?",
            "Please deliver order {order} on {day}.",
            "Can I move the delivery of order {order} to {day}?",
            "I think {day} would be better for order {order}.",
            "Is it possible to get order {order} on {day}?",
            "I can only be at home on {day}. What about order {order}?",
        ],
        answers: &[
            "The new delivery day for order {order} is {day}.",
            "I have moved the delivery of order {order} to {day}.",
            "We moved the delivery, so order {order} will come on {day} before noon.",
            "Order {order} has a new delivery day and will be with you on {day}.",
            "As you asked, I moved the delivery and order {order} comes on {day}.",
            "Your new delivery day is {day}, and the driver has order {order} in the van.",
        ],
    },
];

/// How a customer begins.
pub const OPENINGS: &[&str] = &[
    "Hello, my name is {name}.",
    "Hi, this is {name}.",
    "Hello, I am {name}.",
    "Good morning, this is {name}.",
    "Hi there, it is {name} again.",
    "Dear team, my name is {name}.",
    "Good evening, I am {name}.",
    "Hey, {name} here.",
];

/// What a customer adds about a fact that the question does not need.
pub const ASIDES: &[(Slot, &str)] = &[
    (Product, "I bought the {product} from you last month."),
    (Product, "It is about the {product}."),
    (Product, "I am very happy with the {product} so far."),
    (Order, "My last order was {order}."),
    (Order, "You can find me under order {order}."),
    (City, "I live in {city}."),
    (City, "I am writing from {city}."),
];

/// How a customer ends.
pub const TAILS: &[&str] = &[
    "Thank you!",
    "Thanks in advance.",
    "Please answer soon.",
    "I hope you can help me.",
    "Many thanks.",
    "I look forward to your answer.",
];

/// How a reply greets; followed by a comma or an exclamation mark.
pub const GREETINGS: &[&str] = &[
    "Hello {name}",
    "Hi {name}",
    "Dear {name}",
    "Good day {name}",
];

/// A courteous half sentence after the greeting and a comma.
pub const COURTESIES: &[&str] = &[
    "thank you for your message.",
    "thanks for writing to us.",
    "thank you for getting in touch.",
    "I am happy to help.",
    "thanks for your patience.",
    "thank you for asking.",
    "we are glad to help you with this.",
];

/// How a good reply ends.
pub const CLOSINGS: &[&str] = &[
    "Please let us know if you need anything else.",
    "Have a lovely day!",
    "Kind regards from the help team.",
    "Please write again at any time.",
    "Thank you for shopping with us.",
    "We wish you a nice day!",
];

/// Phrases (lower case, no punctuation) of which a polite reply holds at least one.
pub const COURTEOUS: &[&str] = &[
    "thank you",
    "thanks",
    "please",
    "happy to help",
    "glad to help",
    "have a lovely day",
    "kind regards",
    "wish you a nice day",
];

/// Words with which a greeting begins (lower case).
pub const GREETING_WORDS: &[&str] = &["hello", "hi", "dear", "good day", "good morning"];

/// Sentences of a rude reply; one of them makes a reply impolite.
pub const RUDE: &[&str] = &[
    "This is not my problem.",
    "Stop asking us about it.",
    "You should know that yourself.",
    "We do not have time for you.",
    "Do not write to us again.",
    "That is your own fault.",
    "Read the website before you bother us.",
];

/// Sentences of a rambling reply: true or not, nobody asked.
pub const RAMBLES: &[&str] = &[
    "Our company has sold all kinds of things for many years and we love what we do.",
    "A lot of customers write to us every day and we read every message with great care.",
    "Our website has many pages where one can read about all the things that we sell.",
    "There are many ways to reach us and every way is good in its own special way.",
    "The weather has been strange this year and the roads are often full of cars.",
    "We have a newsletter with many stories about our people and about our plans.",
    "Some people like to shop in the morning and some people like to shop late at night.",
    "It is always a great joy for all of us to talk about our work with other people.",
];

/// Replies that say next to nothing; they follow the greeting and a comma.
pub const STUBS: &[&str] = &[
    "we know.",
    "it is done.",
    "ask again later.",
    "maybe.",
    "we will see.",
];

#[cfg(test)]
mod tests {
    use super::super::lexicon::{CITIES, CLOTHES, DAYS, NAMES, THINGS};
    use super::*;
    use crate::text_stats::words;
    use std::collections::BTreeSet;

    fn fixed_texts() -> Vec<&'static str> {
        let mut texts = [
            OPENINGS, TAILS, GREETINGS, COURTESIES, CLOSINGS, RUDE, RAMBLES, STUBS,
        ]
        .concat();
        texts.extend(ASIDES.iter().map(|aside| aside.1));
        for intent in INTENTS {
            texts.extend(
                intent
                    .questions
                    .iter()
                    .chain(intent.answers)
                    .chain(intent.keys),
            );
        }
        texts
    }

    #[test]
    fn a_slot_word_can_only_be_a_filled_slot() {
        let lists = [NAMES, THINGS, CLOTHES, CITIES, DAYS].concat();
        let slot_words: BTreeSet<String> = lists.iter().map(|w| w.to_lowercase()).collect();
        assert_eq!(
            slot_words.len(),
            lists.len(),
            "a word fills two kinds of slots"
        );
        for text in fixed_texts() {
            for word in words(text) {
                assert!(!slot_words.contains(&word), "`{word}` in `{text}`");
            }
            assert!(!text.contains(|c: char| c.is_ascii_digit()), "{text}");
        }
    }

    #[test]
    fn a_placeholder_follows_a_blank() {
        for text in fixed_texts() {
            for (at, _) in text.match_indices('{') {
                assert_eq!(text[..at].chars().last(), Some(' '), "{text}");
            }
            let mut rest = text.to_owned();
            for slot in Slot::ALL {
                rest = rest.replace(slot.placeholder(), "");
            }
            assert!(!rest.contains(['{', '}']), "{text}");
        }
    }

    #[test]
    fn an_answer_holds_its_facts_and_its_key_alone() {
        for intent in INTENTS {
            for answer in intent.answers {
                for slot in Slot::ALL {
                    let needed = intent.needs.contains(&slot);
                    assert_eq!(answer.contains(slot.placeholder()), needed, "{answer}");
                }
                let plain = words(answer).join(" ");
                for other in INTENTS {
                    let holds = other.keys.iter().any(|key| plain.contains(key));
                    assert_eq!(holds, other.id == intent.id, "{answer} and {}", other.id);
                }
            }
            for question in intent.questions {
                for slot in Slot::ALL {
                    let needed = intent.needs.contains(&slot);
                    assert_eq!(question.contains(slot.placeholder()), needed, "{question}");
                }
            }
        }
        assert!(
            RAMBLES
                .iter()
                .chain(CLOSINGS)
                .chain(COURTESIES)
                .all(|text| {
                    let plain = words(text).join(" ");
                    INTENTS
                        .iter()
                        .all(|intent| intent.keys.iter().all(|key| !plain.contains(key)))
                })
        );
    }
}
