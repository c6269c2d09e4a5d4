//! The words that fill slots: names, products, cities, weekdays and the shape of an order number.
//!
//! Invariant: no word of these lists occurs in a fixed text of [`super::grammar`], so that a slot
//! word in a reply can only be a filled slot. A unit test there holds it.

/// Customer names.
pub const NAMES: &[&str] = &[
    "Adam", "Amira", "Anna", "Bella", "Ben", "Boris", "Carla", "Clara", "Colin", "Daniel", "David",
    "Diana", "Elena", "Emma", "Ethan", "Felix", "Fiona", "Frank", "George", "Gloria", "Grace",
    "Hannah", "Henry", "Hugo", "Irene", "Isabel", "Ivan", "James", "Jonas", "Julia", "Karen",
    "Kevin", "Laura", "Lena", "Liam", "Marco", "Maria", "Martin", "Nina", "Nora", "Olga", "Oliver",
    "Oscar", "Paula", "Peter", "Priya", "Quentin", "Rosa", "Ruth", "Samuel", "Simon", "Tara",
    "Tessa", "Umar", "Vera", "Victor", "Walter", "Wendy", "Yusuf", "Zoe",
];

/// Products that can be plugged in, sat on or played: they have a warranty and no size.
pub const THINGS: &[&str] = &[
    "backpack", "bicycle", "blender", "camera", "carpet", "chair", "clock", "drill", "guitar",
    "hammer", "heater", "helmet", "kettle", "keyboard", "ladder", "lamp", "mattress", "mirror",
    "printer", "radio", "sofa", "speaker", "suitcase", "tablet", "tent", "toaster", "umbrella",
    "violin",
];

/// Products that are worn: they have a size.
pub const CLOTHES: &[&str] = &[
    "belt", "blouse", "cardigan", "coat", "dress", "hat", "hoodie", "jacket", "raincoat", "shirt",
    "skirt", "sweater",
];

/// Cities with a shop.
pub const CITIES: &[&str] = &[
    "Austin", "Belfast", "Boston", "Bristol", "Cardiff", "Chicago", "Denver", "Dublin", "Glasgow",
    "Leeds", "Oxford", "Perth", "Seattle", "Sydney", "Toronto", "York",
];

/// Days on which parcels are delivered.
pub const DAYS: &[&str] = &[
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// First letters of order numbers; letters that are a word by themselves are left out.
pub const ORDER_LETTERS: &[u8] = b"BCDEFGHJKLMNPRSTVWXZ";

/// How many digits follow the letter of an order number, all of them different.
pub const ORDER_DIGITS: usize = 2;
