//! Tokens to a tree, by Jinja 3.1's grammar with loop controls and `{% generation %}`.

use std::sync::Arc;

use super::ast::{Constant, Does, Expr, For, Macro, Names, Statement, Target, Template};
use super::fault::{Fault, Result};
use super::lexer::{Token, tokens};

/// How deep expressions and blocks may lie in each other. Python gives up at about 80 parentheses.
const DEEPEST: usize = 200;

pub(super) fn parse(source: &str) -> Result<Template> {
    let tokens = tokens(source)?;
    let mut parser = Parser { tokens, at: 0, depth: 0, lenient: false, loops: 0, names: Names::default() };
    let body = parser.body(&[])?;
    Ok(Template { body, names: parser.names })
}

pub(super) struct Parser {
    pub(super) tokens: Vec<(Token, usize)>,
    pub(super) at: usize,
    pub(super) depth: usize,
    /// Inside of a condition: there an unknown filter is an error only when it is reached.
    pub(super) lenient: bool,
    /// Loops around, for `break`.
    pub(super) loops: usize,
    pub(super) names: Names,
}

impl Parser {
    pub(super) fn token(&self) -> &Token {
        self.ahead(0)
    }

    pub(super) fn ahead(&self, count: usize) -> &Token {
        self.tokens.get(self.at + count).or(self.tokens.last()).map_or(&Token::End, |(token, _)| token)
    }

    pub(super) fn line(&self) -> usize {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(0, |(_, line)| *line)
    }

    pub(super) fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Fault::syntax(message, self.line()))
    }

    pub(super) fn next(&mut self) {
        self.at += 1;
    }

    pub(super) fn is_op(&self, operator: &str) -> bool {
        matches!(self.token(), Token::Op(found) if *found == operator)
    }

    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self.token(), Token::Name(found) if found == name)
    }

    pub(super) fn takes_op(&mut self, operator: &str) -> bool {
        let found = self.is_op(operator);
        self.at += usize::from(found);
        found
    }

    pub(super) fn takes_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    pub(super) fn expect_op(&mut self, operator: &str) -> Result<()> {
        if self.takes_op(operator) { Ok(()) } else { self.expected(&format!("'{operator}'")) }
    }

    pub(super) fn expect_name(&mut self, name: &str) -> Result<()> {
        if self.takes_name(name) { Ok(()) } else { self.expected(&format!("'{name}'")) }
    }

    pub(super) fn expect(&mut self, token: &Token) -> Result<()> {
        if self.token() == token {
            self.next();
            return Ok(());
        }
        self.expected(&described(token))
    }

    pub(super) fn expected<T>(&self, what: &str) -> Result<T> {
        self.fail(format!("expected {what}, got {}", described(self.token())))
    }

    pub(super) fn name(&mut self) -> Result<String> {
        let Token::Name(name) = self.token() else { return self.expected("a name") };
        let name = name.clone();
        self.next();
        Ok(name)
    }

    /// Goes one level down.
    pub(super) fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth >= DEEPEST {
            let found = format!("expressions or blocks within each other, more than {DEEPEST} deep");
            return Err(Fault::refused(found).at(self.line()));
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    pub(super) fn leniently<T>(&mut self, lenient: bool, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let before = std::mem::replace(&mut self.lenient, lenient);
        let parsed = parse(self);
        self.lenient = before;
        parsed
    }

    /// Statements up to one of the ends, whose name stays to be read.
    pub(super) fn body(&mut self, ends: &[&str]) -> Result<Vec<Statement>> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            match self.token() {
                Token::Data(text) => {
                    let does = Does::Data(text.as_str().into());
                    self.next();
                    body.push(Statement { line, does });
                }
                Token::VariableBegin => {
                    self.next();
                    let does = Does::Print(self.tuple(true, &[])?);
                    self.expect(&Token::VariableEnd)?;
                    body.push(Statement { line, does });
                }
                Token::BlockBegin => {
                    self.next();
                    if ends.iter().any(|end| self.is_name(end)) {
                        return Ok(body);
                    }
                    let statement = self.deeper(|parser| parser.statement(ends))?;
                    body.extend(statement.into_iter().map(|does| Statement { line, does }));
                    self.expect(&Token::BlockEnd)?;
                }
                Token::End if ends.is_empty() => return Ok(body),
                Token::End => return self.fail(format!("Unexpected end of template: expected {}", ends.join(" or "))),
                _ => return self.fail("a template that can not be read"),
            }
        }
    }

    /// The body of a block, behind the block's head.
    pub(super) fn block(&mut self, ends: &[&str]) -> Result<Vec<Statement>> {
        self.takes_op(":");
        self.expect(&Token::BlockEnd)?;
        self.body(ends)
    }

    /// As `block`, with its only end.
    pub(super) fn whole_block(&mut self, end: &str) -> Result<Vec<Statement>> {
        let body = self.block(&[end])?;
        self.next();
        Ok(body)
    }

    pub(super) fn statement(&mut self, ends: &[&str]) -> Result<Vec<Does>> {
        let Token::Name(tag) = self.token() else { return self.fail("tag name expected") };
        let tag = tag.clone();
        self.next();
        let does = match tag.as_str() {
            "for" => self.for_loop()?,
            "if" => self.condition()?,
            "set" => self.set()?,
            "macro" => self.macro_block()?,
            "call" => self.call_block()?,
            "filter" => {
                let filter = self.filters(None, true)?;
                Does::Filter { filter, body: self.leniently(false, |p| p.whole_block("endfilter"))? }
            }
            "with" => self.with()?,
            "print" => return self.print(),
            "block" => self.named_block()?,
            "generation" => Does::Scope { root: false, body: self.apart(|p| p.whole_block("endgeneration"))? },
            "break" | "continue" if self.loops == 0 => {
                return self.fail(format!("'{tag}' outside loop"));
            }
            "break" => Does::Break,
            "continue" => Does::Continue,
            "autoescape" => {
                if !matches!(self.expression()?, Expr::Constant(Constant::Bool(false))) {
                    return Err(Fault::refused("autoescape: chat is plain text").at(self.line()));
                }
                Does::Scope { root: false, body: self.leniently(false, |p| p.whole_block("endautoescape"))? }
            }
            "include" | "import" | "from" | "extends" => {
                return self
                    .fail(format!("'{tag}': a chat template is alone, there is no loader for this environment"));
            }
            _ if ends.is_empty() => return self.fail(format!("Encountered unknown tag '{tag}'.")),
            _ => {
                let wanted = ends.join(" or ");
                return self.fail(format!("Encountered unknown tag '{tag}'. Jinja was looking for: {wanted}."));
            }
        };
        Ok(vec![does])
    }

    /// Parses what is a function of its own in Jinja: no `break` leads out of it.
    pub(super) fn apart<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let loops = std::mem::take(&mut self.loops);
        let parsed = self.leniently(false, parse);
        self.loops = loops;
        parsed
    }

    pub(super) fn print(&mut self) -> Result<Vec<Does>> {
        let mut printed = Vec::new();
        while *self.token() != Token::BlockEnd {
            if !printed.is_empty() {
                self.expect_op(",")?;
            }
            printed.push(Does::Print(self.expression()?));
        }
        Ok(printed)
    }

    pub(super) fn for_loop(&mut self) -> Result<Does> {
        let target = self.target(false, &["in"])?;
        if matches!(&target, Target::Name(name) if name == "loop") {
            return self.fail("Can't assign to special loop variable in for-loop.");
        }
        self.expect_name("in")?;
        let over = self.tuple(false, &["recursive"])?;
        let test = if self.takes_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.takes_name("recursive");
        self.loops += 1;
        let body = self.leniently(false, |p| p.block(&["endfor", "else"]));
        self.loops -= 1;
        let body = body?;
        let otherwise = if self.takes_name("else") {
            self.leniently(false, |p| p.whole_block("endfor"))?
        } else {
            self.next();
            Vec::new()
        };
        self.names.written.insert("loop".into());
        Ok(Does::For(Box::new(For { target, over, test, recursive, body, otherwise })))
    }

    pub(super) fn condition(&mut self) -> Result<Does> {
        self.leniently(true, |parser| {
            let (mut branches, mut otherwise) = (Vec::new(), Vec::new());
            loop {
                let test = parser.tuple(false, &[])?;
                branches.push((test, parser.block(&["elif", "else", "endif"])?));
                if parser.takes_name("elif") {
                    continue;
                }
                if parser.takes_name("else") {
                    otherwise = parser.whole_block("endif")?;
                } else {
                    parser.next();
                }
                return Ok(Does::If { branches, otherwise });
            }
        })
    }

    pub(super) fn set(&mut self) -> Result<Does> {
        let target = self.target(true, &[])?;
        if self.takes_op("=") {
            return Ok(Does::Set { target, value: self.tuple(true, &[])? });
        }
        let filter = if self.is_op("|") { Some(self.filters(None, false)?) } else { None };
        let body = self.apart(|p| p.whole_block("endset"))?;
        Ok(Does::SetBlock { target, filter, body })
    }

    pub(super) fn with(&mut self) -> Result<Does> {
        let (mut targets, mut values) = (Vec::new(), Vec::new());
        while *self.token() != Token::BlockEnd {
            if !targets.is_empty() {
                self.expect_op(",")?;
            }
            targets.push(self.target(false, &[])?);
            self.expect_op("=")?;
            values.push(self.expression()?);
        }
        let body = self.leniently(false, |p| p.whole_block("endwith"))?;
        Ok(Does::With { targets, values, body })
    }

    pub(super) fn named_block(&mut self) -> Result<Does> {
        let name = self.name()?;
        self.takes_name("scoped");
        self.takes_name("required");
        let body = self.apart(|p| p.whole_block("endblock"))?;
        self.takes_name(&name);
        Ok(Does::Scope { root: true, body })
    }

    /// Parameters and their defaults.
    pub(super) fn signature(&mut self) -> Result<(Vec<String>, Vec<Expr>)> {
        let (mut parameters, mut defaults) = (Vec::new(), Vec::new());
        self.expect_op("(")?;
        while !self.is_op(")") {
            if !parameters.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.name()?;
            self.names.written.insert(name.clone());
            parameters.push(name);
            if self.takes_op("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return self.fail("non-default argument follows default argument");
            }
        }
        self.expect_op(")")?;
        Ok((parameters, defaults))
    }

    pub(super) fn macro_block(&mut self) -> Result<Does> {
        let name = self.name()?;
        self.names.written.insert(name.clone());
        Ok(Does::Macro(Arc::new(self.macro_body(name, "endmacro", true, None)?.0)))
    }

    pub(super) fn call_block(&mut self) -> Result<Does> {
        let parameters = self.is_op("(");
        let (body, call) = self.macro_body("caller".into(), "endcall", parameters, Some(()))?;
        match call {
            Some(call @ Expr::Call(..)) => Ok(Does::Call { call, body: Arc::new(body) }),
            _ => self.fail("expected call"),
        }
    }

    /// A macro, or the body of a call with the call in front of it.
    pub(super) fn macro_body(
        &mut self,
        name: String,
        end: &str,
        signed: bool,
        called: Option<()>,
    ) -> Result<(Macro, Option<Expr>)> {
        // What the body reads is asked for the special names; what is around must not count.
        let (parameters, defaults) = if signed { self.signature()? } else { (Vec::new(), Vec::new()) };
        let call = if called.is_some() { Some(self.expression()?) } else { None };
        let outer = std::mem::take(&mut self.names.read);
        let body = self.apart(|p| p.whole_block(end));
        let inner = std::mem::replace(&mut self.names.read, outer);
        let reads = |special: &str| inner.contains(special) && !parameters.iter().any(|p| p == special);
        let parsed = Macro {
            reads_varargs: reads("varargs"),
            reads_kwargs: reads("kwargs"),
            reads_caller: reads("caller"),
            name,
            parameters,
            defaults,
            body: body?,
        };
        self.names.read.extend(inner);
        self.names.written.extend(["varargs", "kwargs", "caller"].map(str::to_owned));
        Ok((parsed, call))
    }

    /// What is assigned to.
    pub(super) fn target(&mut self, namespaces: bool, ends: &[&str]) -> Result<Target> {
        self.one_or_tuple(ends, |parser| parser.one_target(namespaces), Target::Tuple)
    }

    /// One item, or a tuple of several with commas between them, up to a bracket, the end of the tag, or a name of `ends`.
    pub(super) fn one_or_tuple<T>(
        &mut self,
        ends: &[&str],
        item: impl Fn(&mut Self) -> Result<T>,
        tuple: impl FnOnce(Vec<T>) -> T,
    ) -> Result<T> {
        let (mut items, mut is_tuple) = (Vec::new(), false);
        loop {
            let at_end = matches!(self.token(), Token::BlockEnd | Token::VariableEnd)
                || self.is_op(")")
                || ends.iter().any(|end| self.is_name(end));
            if at_end {
                break;
            }
            items.push(item(self)?);
            if !self.takes_op(",") {
                break;
            }
            is_tuple = true;
        }
        match (items.pop(), is_tuple) {
            (Some(only), false) => Ok(only),
            (Some(last), true) => {
                items.push(last);
                Ok(tuple(items))
            }
            (None, _) => self.expected("an expression"),
        }
    }

    pub(super) fn one_target(&mut self, namespaces: bool) -> Result<Target> {
        if self.takes_op("(") {
            let target = self.deeper(|parser| parser.target(namespaces, &[]))?;
            self.expect_op(")")?;
            return Ok(target);
        }
        let name = match self.token() {
            Token::Name(name) if !is_constant(name) => name.clone(),
            _ => return self.fail(format!("can't assign to {}", described(self.token()))),
        };
        self.next();
        if namespaces && self.takes_op(".") {
            let attribute = self.name()?;
            self.names.read.insert(name.clone());
            return Ok(Target::Attribute(name, attribute));
        }
        self.names.written.insert(name.clone());
        Ok(Target::Name(name))
    }
}

fn is_constant(name: &str) -> bool {
    matches!(name, "true" | "True" | "false" | "False" | "none" | "None")
}

pub(super) fn described(token: &Token) -> String {
    match token {
        Token::Data(_) => "template data".into(),
        Token::VariableBegin => "begin of print statement".into(),
        Token::VariableEnd => "end of print statement".into(),
        Token::BlockBegin => "begin of statement block".into(),
        Token::BlockEnd => "end of statement block".into(),
        Token::Name(name) => format!("'{name}'"),
        Token::Str(text) => format!("{text:?}"),
        Token::Int(number) => number.to_string(),
        Token::Float(number) => number.to_string(),
        Token::Op(operator) => format!("'{operator}'"),
        Token::End => "end of template".into(),
    }
}
