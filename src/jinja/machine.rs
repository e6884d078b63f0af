//! Renders a template: statements, scopes, and the values that have a state.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use indexmap::IndexMap;

use super::ast::{Does, Expr, For, Macro, Statement, Target};
use super::budget::Budget;
use super::clock::Clock;
use super::fault::{Fault, Kind, Result};
use super::value::{Held, Key, Value};

/// How deep macros, loops and expressions may be nested while they run.
const DEEPEST: usize = 1000;

pub(super) struct Machine<'t> {
    pub(super) budget: Budget,
    pub(super) clock: Clock,
    scopes: Vec<Scope<'t>>,
    /// Scopes below this one are held by a macro, and stay.
    pinned: usize,
    depth: usize,
    namespaces: Vec<IndexMap<String, Value>>,
    generators: Vec<VecDeque<Value>>,
    loops: Vec<Loop<'t>>,
    macros: Vec<(&'t Macro, usize)>,
    cyclers: Vec<(Vec<Value>, usize)>,
    joiners: Vec<(String, bool)>,
}

#[derive(Debug, Default)]
struct Scope<'t> {
    names: HashMap<&'t str, Value>,
    parent: Option<usize>,
}

/// A loop that runs.
struct Loop<'t> {
    of: &'t For,
    /// The scope around it, where its test looks.
    scope: usize,
    left: VecDeque<Value>,
    /// What has passed the test already.
    ahead: VecDeque<Value>,
    /// Items before the test, where there is none.
    length: Option<usize>,
    index: usize,
    depth: usize,
    before: Option<Value>,
    current: Option<Value>,
    changed: Option<Vec<Value>>,
}

/// How a body ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    On,
    Break,
    Continue,
}

/// Arguments of a call, evaluated.
#[derive(Debug, Default)]
pub(super) struct Given {
    pub(super) positional: Vec<Value>,
    pub(super) named: IndexMap<String, Value>,
}

impl<'t> Machine<'t> {
    pub(super) fn new(context: &'t [(String, Value)], clock: Clock) -> Self {
        let names = context.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        Self {
            budget: Budget::new(),
            clock,
            scopes: vec![Scope { names, parent: None }, Scope { names: HashMap::new(), parent: Some(0) }],
            pinned: 0,
            depth: 0,
            namespaces: Vec::new(),
            generators: Vec::new(),
            loops: Vec::new(),
            macros: Vec::new(),
            cyclers: Vec::new(),
            joiners: Vec::new(),
        }
    }

    /// Runs something one level down.
    pub(super) fn nested<T>(&mut self, run: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth >= DEEPEST {
            return Err(Fault::refused(format!("maximum recursion depth exceeded: more than {DEEPEST} levels")));
        }
        self.depth += 1;
        let done = run(self);
        self.depth -= 1;
        done
    }

    /// Runs something in a scope of its own.
    fn scoped<T>(&mut self, parent: usize, run: impl FnOnce(&mut Self, usize) -> Result<T>) -> Result<T> {
        self.budget.items(4)?;
        let scope = self.scopes.len();
        self.scopes.push(Scope { names: HashMap::new(), parent: Some(parent) });
        let done = self.nested(|machine| run(machine, scope));
        if scope >= self.pinned {
            self.scopes.truncate(scope);
        }
        done
    }

    pub(super) fn lookup(&self, name: &str, scope: usize) -> Option<Value> {
        let mut at = Some(scope);
        while let Some(scope) = at.and_then(|at| self.scopes.get(at)) {
            if let Some(value) = scope.names.get(name) {
                return Some(value.clone());
            }
            at = scope.parent;
        }
        None
    }

    fn store(&mut self, name: &'t str, value: Value, scope: usize) -> Result<()> {
        self.budget.items(1)?;
        if let Some(scope) = self.scopes.get_mut(scope) {
            scope.names.insert(name, value);
        }
        Ok(())
    }

    pub(super) fn run(&mut self, body: &'t [Statement], scope: usize, out: &mut String) -> Result<Flow> {
        for statement in body {
            self.budget.step()?;
            let flow = self.statement(&statement.does, scope, out).map_err(|fault| fault.at(statement.line))?;
            if flow != Flow::On {
                return Ok(flow);
            }
        }
        Ok(Flow::On)
    }

    fn write(&mut self, text: &str, out: &mut String) -> Result<()> {
        self.budget.make(text.len())?;
        out.push_str(text);
        Ok(())
    }

    fn print(&mut self, value: &Value, out: &mut String) -> Result<()> {
        let text = self.string(value)?;
        self.write(&text, out)
    }

    fn statement(&mut self, does: &'t Does, scope: usize, out: &mut String) -> Result<Flow> {
        match does {
            Does::Data(text) => self.write(text, out)?,
            Does::Print(expr) => {
                let value = self.evaluate(expr, scope)?;
                self.print(&value, out)?;
            }
            Does::If { branches, otherwise } => {
                for (test, body) in branches {
                    if self.evaluate(test, scope)?.truth() {
                        return self.nested(|machine| machine.run(body, scope, out));
                    }
                }
                return self.nested(|machine| machine.run(otherwise, scope, out));
            }
            Does::For(of) => {
                let over = self.evaluate(&of.over, scope)?;
                self.for_loop(of, &over, scope, 0, out)?;
            }
            Does::Set { target, value } => {
                let value = self.evaluate(value, scope)?;
                self.assign(target, value, scope)?;
            }
            Does::SetBlock { target, filter, body } => {
                let text = self.captured(body, filter.as_ref(), scope)?;
                self.assign(target, text, scope)?;
            }
            Does::Macro(body) => {
                let value = self.new_macro(body, scope)?;
                self.store(&body.name, value, scope)?;
            }
            Does::Call { call, body } => {
                let caller = self.new_macro(body, scope)?;
                let value = self.call_with(call, scope, Some(caller))?;
                self.print(&value, out)?;
            }
            Does::Filter { filter, body } => {
                let value = self.captured(body, Some(filter), scope)?;
                self.print(&value, out)?;
            }
            Does::With { targets, values, body } => {
                let values: Vec<Value> =
                    values.iter().map(|value| self.evaluate(value, scope)).collect::<Result<_>>()?;
                return self.scoped(scope, |machine, inner| {
                    for (target, value) in targets.iter().zip(values) {
                        machine.assign(target, value, inner)?;
                    }
                    machine.run(body, inner, out)
                });
            }
            Does::Scope { root, body } => {
                let parent = if *root { 1 } else { scope };
                return self.scoped(parent, |machine, inner| machine.run(body, inner, out));
            }
            Does::Break => return Ok(Flow::Break),
            Does::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::On)
    }

    /// What a body writes, filtered.
    fn captured(&mut self, body: &'t [Statement], filter: Option<&'t Expr>, scope: usize) -> Result<Value> {
        self.scoped(scope, |machine, inner| {
            let mut text = String::new();
            machine.run(body, inner, &mut text)?;
            let text = Value::text(text);
            match filter {
                Some(filter) => machine.evaluate_on(filter, &text, inner),
                None => Ok(text),
            }
        })
    }

    fn assign(&mut self, target: &'t Target, value: Value, scope: usize) -> Result<()> {
        match target {
            Target::Name(name) => self.store(name, value, scope),
            Target::Attribute(name, attribute) => {
                let of = self.lookup(name, scope);
                let Some(Value::Held(Held::Namespace, index)) = of else {
                    return Err(Fault::new(Kind::Python, "cannot assign attribute on non-namespace object"));
                };
                check_attribute(attribute)?;
                self.budget.items(1)?;
                if let Some(namespace) = self.namespaces.get_mut(index) {
                    namespace.insert(attribute.clone(), value);
                }
                Ok(())
            }
            Target::Tuple(targets) => {
                let values = self.items(&value)?;
                if values.len() != targets.len() {
                    let (wanted, found) = (targets.len(), values.len());
                    return Err(Fault::value_error(format!("{wanted} values to unpack expected, got {found}")));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value, scope)?;
                }
                Ok(())
            }
        }
    }

    /// Runs a loop over what `over` holds; it writes its text.
    fn for_loop(&mut self, of: &'t For, over: &Value, scope: usize, depth: usize, out: &mut String) -> Result<()> {
        let left: VecDeque<Value> = self.items(over)?.into();
        let length = of.test.is_none().then_some(left.len());
        let index = self.loops.len();
        self.budget.items(8)?;
        self.loops.push(Loop {
            of,
            scope,
            left,
            ahead: VecDeque::new(),
            length,
            index: 0,
            depth,
            before: None,
            current: None,
            changed: None,
        });
        let mut ran = false;
        self.scoped(scope, |machine, inner| {
            while let Some(item) = machine.next_item(index)? {
                ran = true;
                if let Some(scope) = machine.scopes.get_mut(inner) {
                    scope.names.clear();
                }
                machine.store("loop", Value::Held(Held::Loop, index), inner)?;
                machine.assign(&of.target, item, inner)?;
                if machine.run(&of.body, inner, out)? == Flow::Break {
                    break;
                }
            }
            Ok(())
        })?;
        if let Some(done) = self.loops.get_mut(index) {
            (done.left, done.ahead) = (VecDeque::new(), VecDeque::new());
        }
        if !ran {
            self.scoped(scope, |machine, inner| machine.run(&of.otherwise, inner, out))?;
        }
        Ok(())
    }

    /// Goes on to the next item of a loop.
    fn next_item(&mut self, index: usize) -> Result<Option<Value>> {
        self.budget.step()?;
        let next = self.peek(index)?;
        let Some(running) = self.loops.get_mut(index) else { return Ok(None) };
        running.ahead.pop_front();
        if next.is_some() {
            running.index += 1;
            running.before = running.current.take();
            running.current.clone_from(&next);
        }
        Ok(next)
    }

    /// The next item of a loop that passes its test; it stays the next one.
    fn peek(&mut self, index: usize) -> Result<Option<Value>> {
        loop {
            let Some(running) = self.loops.get_mut(index) else { return Ok(None) };
            if let Some(ahead) = running.ahead.front() {
                return Ok(Some(ahead.clone()));
            }
            let Some(item) = running.left.pop_front() else { return Ok(None) };
            let (of, scope) = (running.of, running.scope);
            if self.passes(of, &item, scope)? {
                let running = self.loops.get_mut(index);
                if let Some(running) = running {
                    running.ahead.push_back(item.clone());
                }
            }
        }
    }

    fn passes(&mut self, of: &'t For, item: &Value, scope: usize) -> Result<bool> {
        let Some(test) = &of.test else { return Ok(true) };
        self.scoped(scope, |machine, inner| {
            machine.assign(&of.target, item.clone(), inner)?;
            Ok(machine.evaluate(test, inner)?.truth())
        })
    }

    /// How many items a loop has.
    fn loop_length(&mut self, index: usize) -> Result<usize> {
        if let Some(length) = self.loops.get(index).and_then(|running| running.length) {
            return Ok(length);
        }
        let left = self.loops.get_mut(index).map(|running| std::mem::take(&mut running.left)).unwrap_or_default();
        let mut kept = Vec::new();
        for item in left {
            let Some((of, scope)) = self.loops.get(index).map(|running| (running.of, running.scope)) else { break };
            if self.passes(of, &item, scope)? {
                kept.push(item);
            }
        }
        let Some(running) = self.loops.get_mut(index) else { return Ok(0) };
        running.ahead.extend(kept);
        let length = running.index + running.ahead.len();
        running.length = Some(length);
        Ok(length)
    }

    /// Index from 1, and length.
    pub(super) fn loop_place(&mut self, index: usize) -> Result<(usize, usize)> {
        let length = self.loop_length(index)?;
        Ok((self.loops.get(index).map_or(0, |running| running.index), length))
    }

    /// `loop.name`; `None` where a loop has no such attribute.
    pub(super) fn loop_attribute(&mut self, index: usize, name: &str) -> Result<Option<Value>> {
        let Some(running) = self.loops.get(index) else { return Ok(None) };
        let (at, depth) = (running.index, running.depth);
        Ok(Some(match name {
            "index" => Value::count(at),
            "index0" => Value::count(at.saturating_sub(1)),
            "first" => Value::Bool(at == 1),
            "depth" => Value::count(depth + 1),
            "depth0" => Value::count(depth),
            "previtem" if at <= 1 => Value::undefined("there is no previous item"),
            "previtem" => running.before.clone().unwrap_or(Value::None),
            "length" => Value::count(self.loop_length(index)?),
            "revindex" => Value::count((self.loop_length(index)? + 1).saturating_sub(at)),
            "revindex0" => Value::count(self.loop_length(index)?.saturating_sub(at)),
            "last" => Value::Bool(self.peek(index)?.is_none()),
            "nextitem" => self.peek(index)?.unwrap_or_else(|| Value::undefined("there is no next item")),
            "cycle" => Value::Method(Arc::new(Value::Held(Held::Loop, index)), "cycle"),
            "changed" => Value::Method(Arc::new(Value::Held(Held::Loop, index)), "changed"),
            _ => return Ok(None),
        }))
    }

    pub(super) fn loop_method(&mut self, index: usize, name: &str, given: Given) -> Result<Value> {
        self.budget.make(given.positional.iter().fold(0_usize, |sum, value| sum.saturating_add(value.weight())))?;
        let Some(running) = self.loops.get_mut(index) else { return Ok(Value::None) };
        if name == "changed" {
            let same = running.changed.as_ref().is_some_and(|before| {
                before.len() == given.positional.len()
                    && before.iter().zip(&given.positional).all(|(l, r)| super::value::equal(l, r))
            });
            running.changed = Some(given.positional);
            return Ok(Value::Bool(!same));
        }
        let place = running.index.saturating_sub(1).checked_rem(given.positional.len());
        let found = place.and_then(|place| given.positional.get(place).cloned());
        found.ok_or_else(|| Fault::kind_error("no items for cycling given"))
    }

    /// `loop(items)` of a recursive loop.
    pub(super) fn recurse(&mut self, index: usize, given: &Given) -> Result<Value> {
        let found = self.loops.get(index).map(|running| (running.of, running.scope, running.depth));
        let Some((of, scope, depth)) = found.filter(|(of, ..)| of.recursive) else {
            let fault = "The loop must have the 'recursive' marker to be called recursively.";
            return Err(Fault::kind_error(fault));
        };
        let [over] = given.positional.as_slice() else {
            return Err(Fault::kind_error("loop() takes one argument"));
        };
        let mut text = String::new();
        self.nested(|machine| machine.for_loop(of, over, scope, depth + 1, &mut text))?;
        Ok(Value::text(text))
    }

    fn new_macro(&mut self, body: &'t Arc<Macro>, scope: usize) -> Result<Value> {
        self.budget.items(2)?;
        self.pinned = self.pinned.max(scope + 1);
        self.macros.push((body, scope));
        Ok(Value::Held(Held::Macro, self.macros.len() - 1))
    }

    pub(super) fn macro_name(&self, index: usize) -> &'t str {
        self.macros.get(index).map_or("", |(body, _)| body.name.as_str())
    }

    /// Calls a macro.
    pub(super) fn call_macro(&mut self, index: usize, mut given: Given) -> Result<Value> {
        let Some((body, scope)) = self.macros.get(index).copied() else { return Ok(Value::None) };
        let wrong = |what: &str| Fault::kind_error(format!("macro {:?} {what}", body.name));
        let caller = if body.reads_caller || !body.reads_kwargs { given.named.shift_remove("caller") } else { None };
        if caller.is_some() && !body.reads_caller && !body.parameters.iter().any(|name| name == "caller") {
            return Err(wrong("was invoked with a caller, which it does not call"));
        }
        let extra = given.positional.split_off(body.parameters.len().min(given.positional.len()));
        let mut values: Vec<Option<Value>> = given.positional.into_iter().map(Some).collect();
        values.resize(body.parameters.len(), None);
        for (name, value) in body.parameters.iter().zip(&mut values) {
            let named = given.named.shift_remove(name);
            match (&value, named) {
                (None, Some(named)) => *value = Some(named),
                (Some(_), Some(_)) => return Err(wrong(&format!("got multiple values for argument {name:?}"))),
                _ => {}
            }
        }
        if !given.named.is_empty() && !body.reads_kwargs {
            let name = given.named.keys().next().cloned().unwrap_or_default();
            return Err(wrong(&format!("takes no keyword argument {name:?}")));
        }
        if !extra.is_empty() && !body.reads_varargs {
            return Err(wrong(&format!("takes not more than {} argument(s)", body.parameters.len())));
        }
        self.scoped(scope, |machine, inner| {
            let plain = body.parameters.len() - body.defaults.len();
            for (place, (name, value)) in body.parameters.iter().zip(values).enumerate() {
                let default = place.checked_sub(plain).and_then(|place| body.defaults.get(place));
                let value = match (value, default) {
                    (Some(value), _) => value,
                    (None, Some(default)) => machine.evaluate(default, inner)?,
                    (None, None) => Value::undefined(&format!("parameter '{name}' was not provided")),
                };
                machine.store(name, value, inner)?;
            }
            if body.reads_varargs {
                machine.store("varargs", Value::tuple(extra)?, inner)?;
            }
            if body.reads_kwargs {
                let named = given.named.iter().map(|(name, value)| (Key::text(name), value.clone())).collect();
                machine.store("kwargs", Value::dict(named)?, inner)?;
            }
            if body.reads_caller {
                let caller = caller.unwrap_or_else(|| Value::undefined("No caller defined"));
                machine.store("caller", caller, inner)?;
            }
            let mut text = String::new();
            machine.run(&body.body, inner, &mut text)?;
            Ok(Value::text(text))
        })
    }

    pub(super) fn new_namespace(&mut self, attributes: IndexMap<String, Value>) -> Result<Value> {
        attributes.keys().try_for_each(|name| check_attribute(name))?;
        self.budget.items(4 + attributes.len())?;
        self.namespaces.push(attributes);
        Ok(Value::Held(Held::Namespace, self.namespaces.len() - 1))
    }

    /// A copy of a namespace's attributes.
    pub(super) fn namespace(&self, index: usize) -> IndexMap<String, Value> {
        self.namespaces.get(index).cloned().unwrap_or_default()
    }

    pub(super) fn namespace_attribute(&self, index: usize, name: &str) -> Option<Value> {
        self.namespaces.get(index)?.get(name).cloned()
    }

    /// What is read once.
    pub(super) fn generator(&mut self, items: Vec<Value>) -> Result<Value> {
        self.budget.items(items.len() + 2)?;
        self.generators.push(items.into());
        Ok(Value::Held(Held::Generator, self.generators.len() - 1))
    }

    /// The next item of a generator.
    pub(super) fn pull(&mut self, index: usize) -> Option<Value> {
        self.generators.get_mut(index)?.pop_front()
    }

    pub(super) fn drain(&mut self, index: usize) -> Vec<Value> {
        self.generators.get_mut(index).map(std::mem::take).unwrap_or_default().into()
    }

    pub(super) fn new_cycler(&mut self, items: Vec<Value>) -> Result<Value> {
        if items.is_empty() {
            return Err(Fault::new(Kind::Python, "RuntimeError: at least one item has to be provided"));
        }
        self.budget.items(items.len() + 2)?;
        self.cyclers.push((items, 0));
        Ok(Value::Held(Held::Cycler, self.cyclers.len() - 1))
    }

    /// `current`, `next()` and `reset()` of a cycler.
    pub(super) fn cycler(&mut self, index: usize, does: &str) -> Value {
        let Some((items, at)) = self.cyclers.get_mut(index) else { return Value::None };
        let current = items.get(*at).cloned().unwrap_or(Value::None);
        match does {
            "next" => *at = (*at + 1) % items.len().max(1),
            "reset" => {
                *at = 0;
                return Value::None;
            }
            _ => {}
        }
        current
    }

    pub(super) fn new_joiner(&mut self, separator: String) -> Result<Value> {
        self.budget.items(2)?;
        self.joiners.push((separator, false));
        Ok(Value::Held(Held::Joiner, self.joiners.len() - 1))
    }

    /// A joiner's separator, from its second call on.
    pub(super) fn join_next(&mut self, index: usize) -> Value {
        let Some((separator, used)) = self.joiners.get_mut(index) else { return Value::None };
        if std::mem::replace(used, true) { Value::text(separator.as_str()) } else { Value::text("") }
    }

    /// A filter of a block: its innermost operand is the block's text.
    fn evaluate_on(&mut self, filter: &'t Expr, text: &Value, scope: usize) -> Result<Value> {
        let Expr::Filter(operand, name, arguments) = filter else { return Ok(text.clone()) };
        let operand = match operand {
            Some(inner) => self.evaluate_on(inner, text, scope)?,
            None => text.clone(),
        };
        let given = self.arguments(arguments, scope)?;
        self.filter(name, operand, given, scope)
    }
}

/// Namespaces of chat templates have no hidden attributes.
fn check_attribute(name: &str) -> Result<()> {
    if name.starts_with('_') {
        let fault =
            format!("Chat templates cannot store underscore-prefixed attributes on a namespace, but got '{name}'");
        return Err(Fault::new(Kind::Python, fault));
    }
    Ok(())
}
