//! MessagePack, read in place: nothing is copied, nothing recurses, and a length is believed only as far as bytes follow.

use rmp::Marker;
use rmp::encode::ValueWriteError;

use super::{MAX_EVENT, Malformed, out_of_range};
use crate::fleet::Reason;

/// Reads one value after the other from the front of its input.
pub(super) struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// `what` is named in every refusal.
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.len() > MAX_EVENT {
            let detail = format!("{} bytes, more than {MAX_EVENT}", bytes.len());
            return Err(Malformed { what, reason: Reason::TooLarge, detail });
        }
        Ok(Self { what, rest: bytes })
    }

    /// Reads the one map that the input must be, as [`Reader::map`] does.
    pub(super) fn only_map(
        mut self,
        field: impl FnMut(&mut Self, &'a str) -> Result<bool, Malformed>,
    ) -> Result<(), Malformed> {
        self.map("the message", field)?;
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(self.refuse(Reason::Malformed, format!("{} bytes after its end", self.rest.len())))
    }

    /// Reads a map, calling `field` at the value of each key. `field` either reads the value whole and says `true`, or
    /// says `false` and leaves it to be skipped.
    pub(super) fn map(
        &mut self,
        name: &str,
        mut field: impl FnMut(&mut Self, &'a str) -> Result<bool, Malformed>,
    ) -> Result<(), Malformed> {
        let pairs = match self.marker()? {
            Marker::FixMap(pairs) => u32::from(pairs),
            Marker::Map16 => self.length::<2>()?,
            Marker::Map32 => self.length::<4>()?,
            other => return Err(self.wrong(name, "a map", other)),
        };
        for _ in 0..pairs {
            let key = self.string("a key")?;
            if !field(self, key)? {
                self.skip()?;
            }
        }
        Ok(())
    }

    /// A whole number that OTLP's signed integers can hold.
    pub(super) fn count(&mut self, field: &str) -> Result<u64, Malformed> {
        let number = self.unsigned(field)?;
        super::count_of(self.what, field, number)
    }

    /// True or false.
    pub(super) fn boolean(&mut self, field: &str) -> Result<bool, Malformed> {
        match self.marker()? {
            Marker::True => Ok(true),
            Marker::False => Ok(false),
            other => Err(self.wrong(field, "true or false", other)),
        }
    }

    /// Whether the next value is nil, which is then passed over.
    pub(super) fn is_nil(&mut self) -> Result<bool, Malformed> {
        let nil = self.peek()? == Marker::Null;
        if nil {
            self.marker()?;
        }
        Ok(nil)
    }

    /// The next value, if it is text.
    pub(super) fn string_if_any(&mut self, field: &str) -> Result<Option<&'a str>, Malformed> {
        let text = matches!(self.peek()?, Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32);
        if text { self.string(field).map(Some) } else { Ok(None) }
    }

    /// The length of an array, whose values follow.
    pub(super) fn array(&mut self, field: &str) -> Result<u32, Malformed> {
        match self.marker()? {
            Marker::FixArray(length) => Ok(length.into()),
            Marker::Array16 => self.length::<2>(),
            Marker::Array32 => self.length::<4>(),
            other => Err(self.wrong(field, "an array", other)),
        }
    }

    /// The number of an array's values, which are passed over; `None` of nil.
    pub(super) fn optional_elements(&mut self, field: &str) -> Result<Option<u32>, Malformed> {
        if self.is_nil()? {
            return Ok(None);
        }
        let length = self.array(field)?;
        for _ in 0..length {
            self.skip()?;
        }
        Ok(Some(length))
    }

    /// A floating point number.
    pub(super) fn float(&mut self, field: &str) -> Result<f64, Malformed> {
        match self.marker()? {
            Marker::F64 => Ok(f64::from_be_bytes(self.fixed()?)),
            Marker::F32 => Ok(f32::from_be_bytes(self.fixed()?).into()),
            other => Err(self.wrong(field, "a floating point number", other)),
        }
    }

    /// A whole number that is not negative.
    pub(super) fn unsigned(&mut self, field: &str) -> Result<u64, Malformed> {
        let marker = self.marker()?;
        self.unsigned_after(marker, field)
    }

    /// The same, or nil.
    pub(super) fn optional_unsigned(&mut self, field: &str) -> Result<Option<u64>, Malformed> {
        match self.marker()? {
            Marker::Null => Ok(None),
            marker => self.unsigned_after(marker, field).map(Some),
        }
    }

    fn unsigned_after(&mut self, marker: Marker, field: &str) -> Result<u64, Malformed> {
        let signed = match marker {
            Marker::FixPos(value) => return Ok(value.into()),
            Marker::U8 => return Ok(u8::from_be_bytes(self.fixed()?).into()),
            Marker::U16 => return Ok(u16::from_be_bytes(self.fixed()?).into()),
            Marker::U32 => return Ok(u32::from_be_bytes(self.fixed()?).into()),
            Marker::U64 => return Ok(u64::from_be_bytes(self.fixed()?)),
            Marker::FixNeg(value) => value.into(),
            Marker::I8 => i8::from_be_bytes(self.fixed()?).into(),
            Marker::I16 => i16::from_be_bytes(self.fixed()?).into(),
            Marker::I32 => i32::from_be_bytes(self.fixed()?).into(),
            Marker::I64 => i64::from_be_bytes(self.fixed()?),
            other => return Err(self.wrong(field, "a whole number", other)),
        };
        u64::try_from(signed).map_err(|_| out_of_range(self.what, field, &signed))
    }

    /// Text.
    pub(super) fn string(&mut self, field: &str) -> Result<&'a str, Malformed> {
        let length = match self.marker()? {
            Marker::FixStr(length) => length.into(),
            Marker::Str8 => self.length::<1>()?,
            Marker::Str16 => self.length::<2>()?,
            Marker::Str32 => self.length::<4>()?,
            other => return Err(self.wrong(field, "text", other)),
        };
        let text = std::str::from_utf8(self.take(length.into())?);
        text.map_err(|error| self.refuse(Reason::Malformed, format!("{field}: {error}")))
    }

    /// Bytes.
    pub(super) fn bytes(&mut self, field: &str) -> Result<&'a [u8], Malformed> {
        let length = match self.marker()? {
            Marker::Bin8 => self.length::<1>()?,
            Marker::Bin16 => self.length::<2>()?,
            Marker::Bin32 => self.length::<4>()?,
            other => return Err(self.wrong(field, "bytes", other)),
        };
        self.take(length.into())
    }

    /// Passes over a value of any type, however deep, without going deep itself.
    fn skip(&mut self) -> Result<(), Malformed> {
        let mut values: u64 = 1;
        while values > 0 {
            values -= 1;
            let (bytes, inner): (u64, u64) = match self.marker()? {
                Marker::FixPos(_) | Marker::FixNeg(_) | Marker::Null | Marker::False | Marker::True => (0, 0),
                Marker::U8 | Marker::I8 => (1, 0),
                Marker::U16 | Marker::I16 | Marker::FixExt1 => (2, 0),
                Marker::FixExt2 => (3, 0),
                Marker::U32 | Marker::I32 | Marker::F32 => (4, 0),
                Marker::FixExt4 => (5, 0),
                Marker::U64 | Marker::I64 | Marker::F64 => (8, 0),
                Marker::FixExt8 => (9, 0),
                Marker::FixExt16 => (17, 0),
                Marker::FixStr(length) => (length.into(), 0),
                Marker::Str8 | Marker::Bin8 => (self.length::<1>()?.into(), 0),
                Marker::Str16 | Marker::Bin16 => (self.length::<2>()?.into(), 0),
                Marker::Str32 | Marker::Bin32 => (self.length::<4>()?.into(), 0),
                Marker::Ext8 => (u64::from(self.length::<1>()?) + 1, 0),
                Marker::Ext16 => (u64::from(self.length::<2>()?) + 1, 0),
                Marker::Ext32 => (u64::from(self.length::<4>()?) + 1, 0),
                Marker::FixArray(values) => (0, values.into()),
                Marker::Array16 => (0, self.length::<2>()?.into()),
                Marker::Array32 => (0, self.length::<4>()?.into()),
                Marker::FixMap(pairs) => (0, 2 * u64::from(pairs)),
                Marker::Map16 => (0, 2 * u64::from(self.length::<2>()?)),
                Marker::Map32 => (0, 2 * u64::from(self.length::<4>()?)),
                Marker::Reserved => return Err(self.refuse(Reason::Malformed, "byte 0xc1".to_owned())),
            };
            self.take(bytes)?;
            values += inner;
        }
        Ok(())
    }

    fn peek(&self) -> Result<Marker, Malformed> {
        self.rest.first().map(|byte| Marker::from_u8(*byte)).ok_or_else(|| self.truncated())
    }

    fn marker(&mut self) -> Result<Marker, Malformed> {
        self.fixed::<1>().map(|[byte]| Marker::from_u8(byte))
    }

    /// A length of `N` bytes, which are four at most.
    fn length<const N: usize>(&mut self) -> Result<u32, Malformed> {
        let bytes = self.fixed::<N>()?;
        Ok(bytes.iter().fold(0, |length, byte| length << 8 | u32::from(*byte)))
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (array, rest) = self.rest.split_first_chunk().ok_or_else(|| self.truncated())?;
        self.rest = rest;
        Ok(*array)
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], Malformed> {
        let split = usize::try_from(length).ok().and_then(|length| self.rest.split_at_checked(length));
        let (taken, rest) = split.ok_or_else(|| self.truncated())?;
        self.rest = rest;
        Ok(taken)
    }

    fn truncated(&self) -> Malformed {
        self.refuse(Reason::Truncated, "ends in the middle".to_owned())
    }

    fn wrong(&self, field: &str, expected: &str, found: Marker) -> Malformed {
        let reason = if found == Marker::Reserved { Reason::Malformed } else { Reason::WrongShape };
        self.refuse(reason, format!("{field} is not {expected} but {found:?}"))
    }

    fn refuse(&self, reason: Reason, detail: String) -> Malformed {
        Malformed { what: self.what, reason, detail }
    }
}

/// A field of a map, found or not. A second value for one key is as wrong as none.
pub(super) fn put<T>(what: &'static str, name: &str, field: &mut Option<T>, value: T) -> Result<bool, Malformed> {
    if field.replace(value).is_some() {
        return Err(Malformed { what, reason: Reason::WrongShape, detail: format!("two values for {name}") });
    }
    Ok(true)
}

/// What [`put`] found.
pub(super) fn found<T>(what: &'static str, name: &str, field: Option<T>) -> Result<T, Malformed> {
    field.ok_or_else(|| Malformed { what, reason: Reason::WrongShape, detail: format!("no {name}") })
}

/// Writes to memory, which does not fail.
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    /// Starts a map of so many fields.
    pub(super) fn map(fields: u32) -> Self {
        Self(Vec::new()).open_map(fields)
    }

    /// The name of the next value, within a map.
    pub(super) fn key(self, name: &str) -> Self {
        self.text(name)
    }

    pub(super) fn text(mut self, value: &str) -> Self {
        done(&rmp::encode::write_str(&mut self.0, value));
        self
    }

    pub(super) fn number(mut self, value: u64) -> Self {
        done(&rmp::encode::write_uint(&mut self.0, value).map(|_| ()));
        self
    }

    pub(super) fn nil(mut self) -> Self {
        done(&rmp::encode::write_nil(&mut self.0).map_err(ValueWriteError::InvalidMarkerWrite));
        self
    }

    /// Starts a map of so many fields within this one.
    pub(super) fn open_map(mut self, fields: u32) -> Self {
        done(&rmp::encode::write_map_len(&mut self.0, fields).map(|_| ()));
        self
    }

    /// Starts an array of so many values.
    pub(super) fn open_array(mut self, values: usize) -> Self {
        // What is longer is more than any receiver takes.
        let values = u32::try_from(values).unwrap_or(u32::MAX);
        done(&rmp::encode::write_array_len(&mut self.0, values).map(|_| ()));
        self
    }

    pub(super) fn unsigned(self, name: &str, value: u64) -> Self {
        self.key(name).number(value)
    }

    pub(super) fn optional_unsigned(self, name: &str, value: Option<u64>) -> Self {
        match value {
            Some(value) => self.unsigned(name, value),
            None => self.key(name).nil(),
        }
    }

    pub(super) fn float(mut self, name: &str, value: f64) -> Self {
        self = self.key(name);
        done(&rmp::encode::write_f64(&mut self.0, value));
        self
    }

    pub(super) fn boolean(mut self, name: &str, value: bool) -> Self {
        self = self.key(name);
        done(&rmp::encode::write_bool(&mut self.0, value).map_err(ValueWriteError::InvalidMarkerWrite));
        self
    }

    pub(super) fn string(self, name: &str, value: &str) -> Self {
        self.key(name).text(value)
    }

    pub(super) fn bytes(mut self, name: &str, value: &[u8]) -> Self {
        self = self.key(name);
        done(&rmp::encode::write_bin(&mut self.0, value));
        self
    }
}

fn done(written: &Result<(), ValueWriteError>) {
    debug_assert!(written.is_ok(), "memory takes what is written to it");
}

/// The payload with `old`, which stands after `name`, replaced.
#[cfg(test)]
pub(super) fn replaced(payload: &[u8], name: &str, old: &[u8], new: &[u8]) -> Vec<u8> {
    let found = payload.windows(name.len()).position(|window| window == name.as_bytes());
    let (head, tail) = payload.split_at(found.expect("the name is there") + name.len());
    let tail = tail.strip_prefix(old).expect("the old value is there");
    [head, new, tail].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn skip(bytes: &[u8]) -> Result<(), Malformed> {
        Reader::new("test", bytes)?.only_map(|_, _| Ok(false))
    }

    fn reason(bytes: &[u8]) -> Reason {
        skip(bytes).unwrap_err().reason
    }

    #[test]
    fn a_value_of_every_type_is_skipped() {
        let values: [&[u8]; 24] = [
            &[0x7f],
            &[0xff],
            &[0xc0],
            &[0xc3],
            &[0xcc, 1],
            &[0xd1, 1, 2],
            &[0xca, 1, 2, 3, 4],
            &[0xcf, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0xa2, 1, 2],
            &[0xd9, 2, 1, 2],
            &[0xc5, 0, 2, 1, 2],
            &[0xdb, 0, 0, 0, 2, 1, 2],
            &[0xd4, 1, 1],
            &[0xd5, 1, 1, 2],
            &[0xd6, 1, 1, 2, 3, 4],
            &[0xd7, 1, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0xd8, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0xc7, 2, 1, 1, 2],
            &[0xc9, 0, 0, 0, 0, 1],
            &[0x92, 1, 0x91, 2],
            &[0xdc, 0, 1, 0x80],
            &[0xdd, 0, 0, 0, 1, 0x90],
            &[0xde, 0, 1, 1, 2],
            &[0xdf, 0, 0, 0, 1, 1, 0x81, 1, 1],
        ];
        for value in values {
            let bytes = [&[0x81, 0xa1, b'k'], value].concat();
            assert_eq!(skip(&bytes), Ok(()), "{value:x?}");
            assert_eq!(reason(&bytes[..bytes.len() - 1]), Reason::Truncated, "{value:x?}");
        }
    }

    #[test]
    fn a_message_of_nothing_but_openings_costs_no_stack() {
        let mut bytes = vec![0x81, 0xa1, b'k'];
        bytes.resize(MAX_EVENT, 0x91);
        assert_eq!(reason(&bytes), Reason::Truncated);
        bytes.push(0x91);
        assert_eq!(reason(&bytes), Reason::TooLarge);
    }

    #[test]
    fn a_length_that_lies_is_found_out() {
        assert_eq!(reason(&[0xdf, 0xff, 0xff, 0xff, 0xff]), Reason::Truncated);
        assert_eq!(reason(&[0x81, 0xdb, 0xff, 0xff, 0xff, 0xff]), Reason::Truncated);
        assert_eq!(reason(&[0x81, 0xa1, b'k', 0xdd, 0xff, 0xff, 0xff, 0xff]), Reason::Truncated);
        assert_eq!(reason(&[0x80, 1]), Reason::Malformed);
    }

    #[test]
    fn what_is_no_map_of_names_is_refused() {
        assert_eq!(reason(b""), Reason::Truncated);
        assert_eq!(reason(b"{\"worker_id\":1}"), Reason::WrongShape);
        assert_eq!(reason(&[0xc1]), Reason::Malformed);
        assert_eq!(reason(&[0x81, 1, 1]), Reason::WrongShape);
        assert_eq!(reason(&[0x81, 0xa1, 0xff, 1]), Reason::Malformed);
        assert_eq!(reason(&[0x81, 0xa1, b'k', 0xc1]), Reason::Malformed);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = skip(&bytes);
            let _ = skip(&[&[0x81, 0xa1, b'k'], &bytes[..]].concat());
        }
    }
}
