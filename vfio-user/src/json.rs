// SPDX-License-Identifier: MIT OR Apache-2.0
//! A reader of JSON that takes no memory and no recursion: it looks at a text once
//! and hands out the members of objects whose names matter.
//!
//! No crate fits here. Those without an allocator recurse as deep as the text nests,
//! which lets a peer choose the depth of the stack, and refuse a name that comes twice.

/// The text is no JSON, or nests deeper than [`DEPTH`].
#[derive(Debug)]
pub(crate) struct BadJson;

/// How deep arrays and objects may nest.
const DEPTH: u32 = 32;

/// A place in a JSON text.
#[derive(Clone, Copy)]
pub(crate) struct Json<'a>(&'a [u8]);

/// The value of a member.
#[derive(Clone, Copy)]
pub(crate) enum Value<'a> {
    /// An integer that is not negative and below 2^64.
    Integer(u64),
    Bool(bool),
    /// A whole object, to be walked with [`Json::members`].
    Object(Json<'a>),
    /// Anything else.
    Other,
}

impl<'a> Json<'a> {
    /// The only value of the text.
    pub(crate) fn parse(text: &'a str) -> Result<Value<'a>, BadJson> {
        let mut json = Json(text.as_bytes());
        let value = json.value()?;
        json.space();
        match json.0 {
            [] => Ok(value),
            _ => Err(BadJson),
        }
    }

    /// Calls `each` with the name and value of each member of this object, which
    /// [`Json::value`] has found to be well formed.
    pub(crate) fn members<E: From<BadJson>>(
        mut self,
        mut each: impl FnMut(Name<'a>, Value<'a>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.expect(b'{')?;
        if self.eat(b'}') {
            return Ok(());
        }
        loop {
            let name = self.string()?;
            self.expect(b':')?;
            each(name, self.value()?)?;
            if !self.eat(b',') {
                return Ok(self.expect(b'}')?);
            }
        }
    }

    fn space(&mut self) {
        while let [b' ' | b'\t' | b'\n' | b'\r', rest @ ..] = self.0 {
            self.0 = rest;
        }
    }

    fn eat(&mut self, byte: u8) -> bool {
        self.space();
        match self.0.split_first() {
            Some((first, rest)) if *first == byte => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), BadJson> {
        match self.eat(byte) {
            true => Ok(()),
            false => Err(BadJson),
        }
    }

    /// Walks over one value, however deep.
    fn value(&mut self) -> Result<Value<'a>, BadJson> {
        self.space();
        let start = *self;
        // Bit k: the container at depth k is an object.
        let (mut depth, mut objects) = (0u32, 0u32);
        let mut only = Value::Other;
        loop {
            // A value begins here.
            self.space();
            match self.0.first() {
                Some(open @ (b'{' | b'[')) => {
                    let is_object = *open == b'{';
                    self.expect(*open)?;
                    if depth == 0 && is_object {
                        only = Value::Object(start);
                    }
                    if !self.eat(if is_object { b'}' } else { b']' }) {
                        if depth == DEPTH {
                            return Err(BadJson);
                        }
                        let bit = 1u32.checked_shl(depth).ok_or(BadJson)?;
                        objects = if is_object {
                            objects | bit
                        } else {
                            objects & !bit
                        };
                        depth = depth.saturating_add(1);
                        if is_object {
                            self.string()?;
                            self.expect(b':')?;
                        }
                        continue;
                    }
                }
                _ => {
                    let value = self.scalar()?;
                    if depth == 0 {
                        only = value;
                    }
                }
            }
            // A value has ended here, and perhaps what it is in.
            loop {
                let Some(inner) = depth.checked_sub(1) else {
                    return Ok(only);
                };
                let is_object = objects.checked_shr(inner).unwrap_or(0) & 1 == 1;
                if self.eat(b',') {
                    if is_object {
                        self.string()?;
                        self.expect(b':')?;
                    }
                    break;
                }
                self.expect(if is_object { b'}' } else { b']' })?;
                depth = inner;
            }
        }
    }

    /// A string, number or word.
    fn scalar(&mut self) -> Result<Value<'a>, BadJson> {
        for (word, value) in [
            ("true", Value::Bool(true)),
            ("false", Value::Bool(false)),
            ("null", Value::Other),
        ] {
            if let Some(rest) = self.0.strip_prefix(word.as_bytes()) {
                self.0 = rest;
                return Ok(value);
            }
        }
        match self.0.first() {
            Some(b'"') => self.string().map(|_| Value::Other),
            _ => self.number(),
        }
    }

    fn number(&mut self) -> Result<Value<'a>, BadJson> {
        let mut is_integer = !self.next_is(b"-");
        let mut integer = Some(0u64);
        if !self.next_is(b"0") {
            integer = self.digits()?;
        }
        if self.next_is(b".") {
            is_integer = false;
            self.digits()?;
        }
        if self.next_is(b"eE") {
            is_integer = false;
            self.next_is(b"+-");
            self.digits()?;
        }
        Ok(match integer {
            Some(integer) if is_integer => Value::Integer(integer),
            _ => Value::Other,
        })
    }

    /// Takes the next byte if it is one of `bytes`.
    fn next_is(&mut self, bytes: &[u8]) -> bool {
        match self.0.split_first() {
            Some((first, rest)) if bytes.contains(first) => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    /// One digit or more; `None` if the number is 2^64 or more.
    fn digits(&mut self) -> Result<Option<u64>, BadJson> {
        if !matches!(self.0.first(), Some(b'0'..=b'9')) {
            return Err(BadJson);
        }
        let mut number = Some(0u64);
        while let Some((digit @ b'0'..=b'9', rest)) = self.0.split_first() {
            self.0 = rest;
            let digit = u64::from(digit.saturating_sub(b'0'));
            number = number.and_then(|n| n.checked_mul(10)?.checked_add(digit));
        }
        Ok(number)
    }

    fn string(&mut self) -> Result<Name<'a>, BadJson> {
        self.expect(b'"')?;
        let start = self.0;
        loop {
            match self.0 {
                [b'"', rest @ ..] => {
                    let len = start.len().saturating_sub(self.0.len());
                    self.0 = rest;
                    return Ok(Name(start.get(..len).ok_or(BadJson)?));
                }
                [b'\\', b'u', a, b, c, d, rest @ ..]
                    if [a, b, c, d].iter().all(|hex| hex.is_ascii_hexdigit()) =>
                {
                    self.0 = rest;
                }
                [b'\\', b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', rest @ ..] => {
                    self.0 = rest;
                }
                [b'\\', ..] | [0..=0x1f, ..] | [] => return Err(BadJson),
                [_, rest @ ..] => self.0 = rest,
            }
        }
    }
}

/// The name of a member, as the text has it.
#[derive(Clone, Copy)]
pub(crate) struct Name<'a>(&'a [u8]);

impl Name<'_> {
    /// Whether this is `name`, which has no byte that JSON must escape. A letter of it
    /// may be written `\u006d`, as JSON allows.
    pub(crate) fn is(self, name: &str) -> bool {
        let mut raw = self.0;
        for byte in name.bytes() {
            match raw {
                [b'\\', b'u', b'0', b'0', hex @ ..] => {
                    let Some(([high, low], rest)) = hex.split_first_chunk() else {
                        return false;
                    };
                    let digit = |hex: u8| char::from(hex).to_digit(16);
                    let letter = digit(*high)
                        .zip(digit(*low))
                        .map(|(high, low)| high << 4 | low);
                    if letter != Some(byte.into()) {
                        return false;
                    }
                    raw = rest;
                }
                [first, rest @ ..] if *first == byte => raw = rest,
                _ => return false,
            }
        }
        raw.is_empty()
    }
}
