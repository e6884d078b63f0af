//! Python's `datetime.now().strftime`: the C library's directives in the C locale, on a clock that is given.

use jiff::{Timestamp, Zoned, tz::TimeZone};

use super::fault::{Fault, Result};

/// What a clock on the wall shows: a local time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    year: i64,
    /// From 1.
    month: i64,
    /// Of the month, from 1.
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
    microsecond: i64,
    /// Seconds since 1970-01-01 in UTC.
    since_1970: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
/// Widest field.
pub(super) const WIDEST: usize = 1000;

impl Clock {
    /// The system's time in its zone.
    pub fn now() -> Self {
        Self::of(&Zoned::now())
    }

    /// A time in microseconds since 1970-01-01 in UTC, in a zone as POSIX spells it: `CET-1CEST,M3.5.0,M10.5.0/3`.
    /// `None` for what is no time or no zone.
    pub fn at(microseconds: i64, zone: &str) -> Option<Self> {
        let zone = TimeZone::posix(zone).ok()?;
        Some(Self::of(&Timestamp::from_microsecond(microseconds).ok()?.to_zoned(zone)))
    }

    fn of(time: &Zoned) -> Self {
        Self {
            year: time.year().into(),
            month: time.month().into(),
            day: time.day().into(),
            hour: time.hour().into(),
            minute: time.minute().into(),
            second: time.second().into(),
            microsecond: i64::from(time.subsec_nanosecond()) / 1000,
            since_1970: time.timestamp().as_second(),
        }
    }

    /// Days since 1970-01-01, by years that start in March.
    fn days(&self) -> i64 {
        let (year, month) = (self.year - i64::from(self.month <= 2), self.month);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let shifted = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * shifted + 2) / 5 + self.day - 1;
        era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
    }

    /// 0 is Sunday.
    fn weekday(&self) -> i64 {
        (self.days() + 4).rem_euclid(7)
    }

    /// From 0.
    fn day_of_year(&self) -> i64 {
        self.days() - Self { month: 1, day: 1, ..*self }.days()
    }

    /// Week of the year whose first day is `first` (0 Sunday, 1 Monday).
    fn week(&self, first: i64) -> i64 {
        (self.day_of_year() + 7 - (self.weekday() - first).rem_euclid(7)) / 7
    }

    /// Year and week by ISO 8601.
    fn iso_week(&self) -> (i64, i64) {
        let monday = (self.weekday() + 6) % 7;
        // The week belongs to the year of its Thursday.
        let thursday = self.day_of_year() - monday + 3;
        let length = |year: i64| if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) { 366 } else { 365 };
        if thursday < 0 {
            (self.year - 1, (thursday + length(self.year - 1)) / 7 + 1)
        } else if thursday >= length(self.year) {
            (self.year + 1, (thursday - length(self.year)) / 7 + 1)
        } else {
            (self.year, thursday / 7 + 1)
        }
    }
}

pub(super) fn strftime(format: &str, clock: &Clock) -> Result<String> {
    let mut text = String::new();
    let mut rest = format;
    while let Some((before, after)) = rest.split_once('%') {
        text += before;
        let (field, length) = directive(after, clock)?;
        text += &field;
        rest = after.get(length..).unwrap_or_default();
    }
    Ok(text + rest)
}

/// How a field is written.
#[derive(Default)]
struct Style {
    pad: Option<char>,
    upper: bool,
    swap: bool,
    width: Option<usize>,
}

/// The text of a directive, and how much of the format it took.
fn directive(format: &str, clock: &Clock) -> Result<(String, usize)> {
    let mut style = Style::default();
    let mut letters = format.char_indices().peekable();
    while let Some((_, letter)) = letters.next_if(|(_, c)| matches!(c, '_' | '-' | '0' | '^' | '#')) {
        match letter {
            '^' => style.upper = true,
            '#' => style.swap = true,
            pad => style.pad = Some(pad),
        }
    }
    while let Some(digit) = letters.next_if(|(_, c)| c.is_ascii_digit()).and_then(|(_, c)| c.to_digit(10)) {
        let width = style.width.unwrap_or(0).saturating_mul(10).saturating_add(digit as usize);
        if width > WIDEST {
            return Err(Fault::refused(format!("a field of a date that is wider than {WIDEST}")));
        }
        style.width = Some(width);
    }
    letters.next_if(|(_, c)| matches!(c, 'E' | 'O'));
    let Some((at, letter)) = letters.next() else {
        // An unfinished directive stays.
        return Ok((format!("%{format}"), format.len()));
    };
    let length = at + letter.len_utf8();
    let as_it_is = || format!("%{}", format.get(..length).unwrap_or_default());
    Ok((field(letter, &style, clock)?.unwrap_or_else(as_it_is), length))
}

/// `None` for a letter that means nothing.
fn field(letter: char, style: &Style, clock: &Clock) -> Result<Option<String>> {
    let number = |value: i64, width: usize, pad: char| Some(numeric(value, width, pad, style));
    let (hour, year) = (clock.hour, clock.year);
    let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
    let name = |names: &[&'static str], index: i64| {
        usize::try_from(index).ok().and_then(|index| names.get(index)).copied().unwrap_or_default()
    };
    let month = name(&MONTHS, clock.month - 1);
    let weekday = name(&DAYS, clock.weekday());
    let short = |name: &'static str| name.get(..3).unwrap_or_default();
    let noon = if hour < 12 { "AM" } else { "PM" };
    let composed = |format: &str| strftime(format, clock).map(|text| Some(padded(&text, style, ' ')));
    Ok(match letter {
        'a' => Some(padded(short(weekday), style, ' ')),
        'A' => Some(padded(weekday, style, ' ')),
        'b' | 'h' => Some(padded(short(month), style, ' ')),
        'B' => Some(padded(month, style, ' ')),
        'c' => composed("%a %b %e %H:%M:%S %Y")?,
        'C' => number(year.div_euclid(100), 2, '0'),
        'd' => number(clock.day, 2, '0'),
        'D' | 'x' => composed("%m/%d/%y")?,
        'e' => number(clock.day, 2, ' '),
        'f' => Some(format!("{:06}", clock.microsecond)),
        'F' => composed("%Y-%m-%d")?,
        'g' => number(clock.iso_week().0.rem_euclid(100), 2, '0'),
        'G' => number(clock.iso_week().0, 1, '0'),
        'H' => number(hour, 2, '0'),
        'I' => number(twelve, 2, '0'),
        'j' => number(clock.day_of_year() + 1, 3, '0'),
        'k' => number(hour, 2, ' '),
        'l' => number(twelve, 2, ' '),
        'm' => number(clock.month, 2, '0'),
        'M' => number(clock.minute, 2, '0'),
        'n' => Some("\n".into()),
        'p' if style.swap => Some(padded(&noon.to_lowercase(), &Style { swap: false, ..*style }, ' ')),
        'p' => Some(padded(noon, style, ' ')),
        'P' => Some(padded(&noon.to_lowercase(), style, ' ')),
        'r' => composed("%I:%M:%S %p")?,
        'R' => composed("%H:%M")?,
        's' => number(clock.since_1970, 1, '0'),
        'S' => number(clock.second, 2, '0'),
        't' => Some("\t".into()),
        'T' | 'X' => composed("%H:%M:%S")?,
        'u' => number((clock.weekday() + 6) % 7 + 1, 1, '0'),
        'U' => number(clock.week(0), 2, '0'),
        'V' => number(clock.iso_week().1, 2, '0'),
        'w' => number(clock.weekday(), 1, '0'),
        'W' => number(clock.week(1), 2, '0'),
        'y' => number(year.rem_euclid(100), 2, '0'),
        'Y' => number(year, 1, '0'),
        // A time without a zone has none to name.
        'z' | 'Z' => Some(String::new()),
        '%' => Some("%".into()),
        _ => None,
    })
}

fn numeric(value: i64, width: usize, pad: char, style: &Style) -> String {
    let (pad, width) = match style.pad {
        Some('-') => (' ', style.width.unwrap_or(0)),
        Some('_') => (' ', style.width.unwrap_or(width)),
        Some('0') => ('0', style.width.unwrap_or(width)),
        _ => (pad, style.width.unwrap_or(width)),
    };
    let digits = value.to_string();
    let missing = width.saturating_sub(digits.len());
    let padding: String = std::iter::repeat_n(pad, missing).collect();
    padding + &digits
}

/// A text in its width, in capitals if asked.
fn padded(text: &str, style: &Style, pad: char) -> String {
    let pad = if style.pad == Some('0') { '0' } else { pad };
    let missing = style.width.unwrap_or(0).saturating_sub(text.len());
    let padding: String = std::iter::repeat_n(pad, missing).collect();
    let text = if style.upper || style.swap { text.to_uppercase() } else { text.to_owned() };
    padding + &text
}
